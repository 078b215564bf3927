"""Token ids and decoded text of a hundred languages, code and a million generated characters."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.corpora import fetch_translations, generated_texts, source_code, translations
from tests.parity.figures import record
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTokenizer

ASSETS = Path(__file__).parents[2] / ".assets"
MILLION = 1_000_000


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Path) -> Qwen2_5_VLTokenizer:
    return Qwen2_5_VLTokenizer(vocabulary / "tokenizer.json")


@pytest.fixture(scope="module")
def wheel() -> Path:
    return fetch_translations(ASSETS)


def assert_equal(
    what: str,
    tokenizer: Qwen2_5_VLTokenizer,
    reference: PreTrainedTokenizerFast,
    texts: Sequence[str],
) -> None:
    encodings = reference.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    expected = [encoding.ids for encoding in encodings]
    decoded = reference.batch_decode(expected, clean_up_tokenization_spaces=False)
    for text, ids, back in zip(texts, expected, decoded, strict=True):
        assert tokenizer.encode(text, add_eos=False) == ids, ascii(text)
        assert tokenizer.decode(ids) == back, ascii(text)
    record(f"texts: characters of {what}", sum(map(len, texts)), 0)


def test_reference_is_the_fast_tokenizer(reference_tokenizer: PreTrainedTokenizerFast) -> None:
    """``encode_batch_fast`` of its backend is what its call does."""
    assert type(reference_tokenizer).__name__ == "Qwen2Tokenizer"
    texts = list(generated_texts(1, 10_000))
    encodings = reference_tokenizer.backend_tokenizer.encode_batch_fast(texts)
    assert reference_tokenizer(texts).input_ids == [encoding.ids for encoding in encodings]


def test_languages(tokenizer, reference_tokenizer, wheel: Path) -> None:
    languages = {name: texts for name, texts in translations(wheel).items() if texts}
    # Variants such as es_AR are not languages of their own
    assert len({name.partition("_")[0] for name in languages}) >= 80
    assert sum(sum(map(len, texts)) > 5000 for texts in languages.values()) >= 80
    for texts in languages.values():
        assert_equal("translations", tokenizer, reference_tokenizer, texts)


def test_code(tokenizer, reference_tokenizer, wheel: Path) -> None:
    languages = source_code(wheel)
    assert languages.keys() == {"py", "h", "js", "css", "html", "svg"}
    for texts in languages.values():
        assert sum(map(len, texts)) > 20_000
        assert_equal("source code", tokenizer, reference_tokenizer, texts)


@pytest.mark.parametrize("seed", [0])
def test_generated_unicode(tokenizer, reference_tokenizer, seed: int) -> None:
    texts = list(generated_texts(seed, MILLION))
    assert sum(map(len, texts)) >= MILLION
    assert len(set().union(*texts)) > 100_000
    assert_equal("generated Unicode", tokenizer, reference_tokenizer, texts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_more_generated_unicode(tokenizer, reference_tokenizer, seed: int) -> None:
    texts = list(generated_texts(seed, MILLION))
    assert_equal("generated Unicode", tokenizer, reference_tokenizer, texts)
