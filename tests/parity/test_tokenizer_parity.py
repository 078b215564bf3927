"""Token ids and decoded text beside transformers' tokenizer: no difference at all."""

import hashlib
import json
import os
import random
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from quickstart.vocabulary import write_vocabulary
from tests.parity.figures import record
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTokenizer

# sha256 of Qwen2.5-VL's published tokenizer.json, rewritten by json.dumps(..., sort_keys=True)
PUBLISHED = "53944cb73a2a34812a4272e331ee15e290ae43ae72de4794156f6076690dddb5"
PADDED_VOCABULARY = 151_936

SENTENCES = [
    "The quick brown fox didn't jump; it's asleep, and they'll say we've lost 3,141.59 dollars.",
    "Im Bild schläft ein großer Hund unter dem Apfelbaum. Wie viele Äpfel hängen daran?",
    "Où est l'été ? Le garçon a mangé trois gâteaux, bien qu'il n'eût pas faim.",
    "¿Cuántos niños hay en la fotografía? El pingüino está a la derecha del señor.",
    "Não há ninguém na praça; as crianças estão no avião.",
    "Đây là bức ảnh chụp một con mèo đang ngủ trên chiếc ghế gỗ cũ.",
    "İstanbul'da yağmurlu bir gün: şemsiyesiz çocuklar koşuyor, ışıklar yanıyor.",
    "Zażółć gęślą jaźń. Na zdjęciu widać łódkę i trzy żółte kaczki.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Árvíztűrő tükörfúrógép: hány ember ül az asztalnál?",
    "Það er lítið hús við ána og þar býr gömul kona með æðardún.",
    "Àwọn ọmọdé ń ṣeré nínú ọgbà, ẹyẹ méjì sì wà lórí igi.",
    "На картинке две собаки и одна кошка. Сколько всего животных?",
    "На світлині видно їжака, ґрунтову дорогу й п'ять яблук.",
    "Зураг дээр өндөр уул, үүлтэй тэнгэр харагдаж байна.",
    "Суретте қызыл алма мен көк ұшақ көрініп тұр.",
    "Στη φωτογραφία υπάρχει ένα μικρό λευκό σπίτι δίπλα στη θάλασσα.",
    "Նկարում երևում է մի փոքրիկ տուն և երկու ծառ։",
    "სურათზე ჩანს მაღალი მთა და პატარა სახლი.",
    "בתמונה רואים כלב גדול ליד עץ ירוק. שָׁלוֹם עֲלֵיכֶם",
    "في الصورة قطة سوداء تنام تحت الشجرة. السَّلَامُ عَلَيْكُمْ ١٢٣",
    "در تصویر یک گربهٔ سیاه زیر درخت خوابیده است؛ می‌خواهم ببینم.",
    "تصویر میں ایک بچہ کتاب پڑھ رہا ہے۔",
    "चित्र में एक छोटा लड़का पेड़ के नीचे बैठा है। कितने फल हैं? १२३",
    "ছবিতে একটি বিড়াল ঘুমাচ্ছে এবং দুইটি পাখি উড়ছে।",
    "ਤਸਵੀਰ ਵਿੱਚ ਇੱਕ ਕੁੱਤਾ ਹੈ।",
    "ચિત્રમાં એક મોટું ઝાડ છે.",
    "ଛବିରେ ଗୋଟିଏ ଘର ଅଛି।",
    "படத்தில் ஒரு சிறிய வீடு உள்ளது; கொடி பறக்கிறது.",
    "చిత్రంలో ఒక పెద్ద చెట్టు ఉంది.",
    "ಚಿತ್ರದಲ್ಲಿ ಒಂದು ಬೆಕ್ಕು ಇದೆ.",
    "ചിത്രത്തിൽ ഒരു ചെറിയ വീട് കാണാം.",
    "පින්තූරයේ කුඩා නිවසක් ඇත.",
    "ในภาพมีแมวตัวหนึ่งนอนอยู่ใต้ต้นไม้ใหญ่ ๑๒๓",
    "ໃນຮູບມີແມວໂຕໜຶ່ງ",
    "པར་ནང་ལ་ཁྱི་གཅིག་འདུག",
    "ပုံထဲမှာ ခွေးတစ်ကောင် ရှိတယ်။",
    "នៅក្នុងរូបភាពមានឆ្មាមួយ។",
    "በሥዕሉ ላይ አንድ ትልቅ ዛፍ አለ።",
    "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ",
    "ᐃᓄᒃᑎᑐᑦ ᐅᖃᐅᓯᖅ",
    "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ",
    "ⵜⴰⵎⴰⵣⵉⵖⵜ ⴷ ⵜⵓⵜⵍⴰⵢⵜ",
    "ߒߞߏ ߞߊ߲ߓߍ߲",
    "ދިވެހި ބަސް",
    "图片里有两只猫和一条狗,一共有多少只动物?答案是3只。",
    "圖片裡的招牌寫著「臺灣牛肉麵」,價格是一百二十元。",
    "写真には何が写っていますか?カタカナとひらがな、㈱と①がある。ガギグゲゴ",
    "사진 속에 고양이 두 마리와 강아지 한 마리가 있습니다.",
    "Mixed 文字 и слова في نص واحد, naïve café №5 — “quotes” … ½ ² ™ ﬁ Å Ω K 𝔘𝔫𝔦 𐍈 👍🏽",
]
MARKS = "\u0300\u0301\u0308\u0323\u0327\u0328\u0334\u0338\u0345\u05b0\u064b\u093c\u0e49\u3099\u1dfa"
SPACES = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u200b\u2028\u2029\u3000\ufeff"
CONTROLS = "".join(map(chr, [*range(32), 127, *range(128, 160)]))
EMOJI = "😀❤👍👩👨👧🧑💻🚀🏳🌈⚕✈🤝#1©🫠"
ADDED = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>",
    "<|file_sep|>", "<|box_start|>", "<|im_", "end|>", "<", "|>", "<|", "<tool_call", "<|IM_END|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return Qwen2_5_VLTokenizer(vocabulary / "vocab.json", vocabulary / "merges.txt")


def assert_equal(tokenizer, reference, texts):
    """Compares ids, and the text that they give back with the reference's NFC of the original."""
    normalize = reference.backend_tokenizer.normalizer.normalize_str
    for text, ids in zip(texts, reference(texts).input_ids, strict=True):
        assert tokenizer.encode(text, add_eos=False) == ids, ascii(text)
        if not any(token in text for token in tokenizer.special_tokens):
            assert tokenizer.decode(ids) == normalize(text), ascii(text)
    record("texts: token ids", len(texts), 0)


def mixed(rng, parts, longest):
    return "".join(rng.choice(parts) for _ in range(rng.randint(1, longest)))


def multilingual(rng):
    texts = list(SENTENCES)
    for sentence in SENTENCES:
        texts += [sentence.upper(), unicodedata.normalize("NFD", sentence), f" {sentence}\n\n"]
        texts += sentence.split()
    return texts + [" ".join(rng.sample(SENTENCES, 3)) for _ in range(200)]


def scripts(rng):
    """Random characters of every 64 neighbours in Unicode, as far as they are assigned."""
    for first in [*range(0, 0x32000, 64), *range(0xE0000, 0xE0200, 64)]:
        block = [chr(c) for c in range(first, first + 64)]
        if letters := [c for c in block if unicodedata.category(c) not in ("Cn", "Co", "Cs")]:
            yield mixed(rng, [*letters, *letters, " ", "a"], 40)


def source_code(rng):
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60]:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        yield from ("".join(lines[i : i + 12]) for i in range(0, min(len(lines), 400), 12))


def emoji(rng):
    flags = [chr(c) for c in range(0x1F1E6, 0x1F200)]
    skin_tones = [chr(c) for c in range(0x1F3FB, 0x1F400)]
    parts = [
        *EMOJI,
        *flags,
        *skin_tones,
        "\u200d",
        "\u200d",
        "\ufe0f",
        "\ufe0e",
        "\u20e3",
        " ",
        "a",
    ]
    return [mixed(rng, parts, 15) for _ in range(700)]


def combining(rng):
    marks = [*MARKS, *MARKS, "\u0344", "\u0958", "\u0f73", "\u1dfa", "\u08d3", "\u11a8", "\u1161"]
    parts = [*marks, *"aeoAE가ᄀかक بא<|>\n", "\U000105d2", "\U00011930", "\U00011935"]
    return [mixed(rng, parts, 20) for _ in range(800)]


def spaces_and_controls(rng):
    parts = [*SPACES, *SPACES, *CONTROLS, "  ", "    ", "\n\n", "\r\n", "a", "1", ".", "'s", "é"]
    return [mixed(rng, parts, 25) for _ in range(800)]


def added_tokens(rng):
    parts = [*ADDED, *ADDED, *MARKS, *SPACES, "user", "é", "1", "你"]
    return [mixed(rng, parts, 10) for _ in range(800)]


CORPORA = [multilingual, scripts, source_code, emoji, combining, spaces_and_controls, added_tokens]


@cache
def texts_of(corpus):
    return list(dict.fromkeys(corpus(random.Random(0))))


@pytest.mark.parametrize("corpus", CORPORA)
def test_corpus(tokenizer, reference_tokenizer, corpus):
    assert_equal(tokenizer, reference_tokenizer, texts_of(corpus))


def test_corpora_hold_5000_strings():
    assert len(set().union(*map(texts_of, CORPORA))) >= 5000


@settings(max_examples=600, deadline=None)
@given(st.lists(st.text(max_size=80), min_size=1))
def test_any_unicode(tokenizer, reference_tokenizer, texts):
    assert_equal(tokenizer, reference_tokenizer, texts)


@settings(max_examples=600, deadline=None)
@given(st.lists(st.one_of(st.sampled_from([*ADDED, *MARKS, *SPACES]), st.text(max_size=3))))
def test_any_unicode_beside_added_tokens(tokenizer, reference_tokenizer, parts):
    assert_equal(tokenizer, reference_tokenizer, ["".join(parts)])


def test_normalization_of_every_character(tokenizer, reference_tokenizer):
    # Python and the tokenizers library know different versions of Unicode
    moving = [
        c
        for c in map(chr, range(0x110000))
        if unicodedata.combining(c) or not unicodedata.is_normalized("NFD", c)
    ]
    for context in ("a{}\u0328", "a\u0301{}", "a{}\u0301", "{}\u0334", "\u1dfa{}"):
        assert_equal(tokenizer, reference_tokenizer, [context.format(c) for c in moving])
    pairs = [unicodedata.normalize("NFD", c) for c in moving]
    assert_equal(tokenizer, reference_tokenizer, [f"a{pair}" for pair in pairs])


@pytest.mark.parametrize(
    "text",
    [
        " " * 1_000_000,
        "x!\n"
        + "\u3000 " * 500_000
        + "x"
        + " " * 1_000_000
        + "\n"
        + "\t" * 1_000_000
        + "<|im_end|>",
        "a" * 1_000_000,
        "\r\n" * 500_000,
        "e" + "\u0301\u0328" * 5_000 + "e",
        "\U0001f600\u200d" * 100_000,
        "a b\n \U0001f600é" * 20_000,
    ],
    ids=["spaces", "blanks", "letters", "line breaks", "marks", "emoji", "mixed"],
)
def test_long_runs(tokenizer, reference_tokenizer, text):
    assert_equal(tokenizer, reference_tokenizer, [text])


@pytest.mark.parametrize("skip_special_tokens", [False, True])
def test_decoding_of_any_ids(tokenizer, reference_tokenizer, skip_special_tokens):
    rng = random.Random(0)
    for _ in range(3000):
        size = rng.choice([256, 2000, PADDED_VOCABULARY])
        ids = [rng.randrange(size) for _ in range(rng.randint(0, 20))]
        ids += [rng.randrange(tokenizer.base_vocab_size - 3, PADDED_VOCABULARY) for _ in range(3)]
        ids += [rng.randrange(tokenizer.base_vocab_size, tokenizer.vocab_size) for _ in range(3)]
        rng.shuffle(ids)
        assert tokenizer.decode(ids, skip_special_tokens) == reference_tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize(
    "files", [["vocab.json", "merges.txt"], ["tokenizer.json"], ["qwen.tiktoken"]]
)
def test_sizes_and_added_tokens(vocabulary, reference_tokenizer, files):
    tokenizer = Qwen2_5_VLTokenizer(*(vocabulary / name for name in files))
    assert tokenizer.vocab_size == len(reference_tokenizer) == 151_665
    assert tokenizer.base_vocab_size == reference_tokenizer.vocab_size == 151_643
    assert tokenizer.special_tokens == reference_tokenizer.get_added_vocab()
    assert len(tokenizer.special_tokens) == 22
    assert tokenizer.eos_id == reference_tokenizer.eos_token_id
    assert tokenizer.pad_id == reference_tokenizer.pad_token_id
    assert_equal(tokenizer, reference_tokenizer, SENTENCES)


def test_written_tokenizer_is_the_published_one(vocabulary, tmp_path):
    write_vocabulary(Qwen2_5_VLTokenizer(vocabulary / "qwen.tiktoken"), tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_bytes())
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert digest == PUBLISHED
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (vocabulary / path.name).read_bytes()


def test_transformers_reads_all_written_files_alike(vocabulary, reference_tokenizer, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(vocabulary / name)
    from_vocab = json.loads(AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer.to_str())
    from_tokenizer = json.loads(reference_tokenizer.backend_tokenizer.to_str())
    for part in ("model", "normalizer", "added_tokens"):
        assert from_vocab[part] == from_tokenizer[part]


def test_reads_what_transformers_writes(reference_tokenizer, tokenizer, tmp_path):
    reference_tokenizer.save_pretrained(tmp_path)
    again = Qwen2_5_VLTokenizer(tmp_path / "tokenizer.json")
    assert again.special_tokens == tokenizer.special_tokens
    assert_equal(again, reference_tokenizer, SENTENCES)
