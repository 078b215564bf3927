"""Every example of docs/datasets.md is what it says."""

import json
import re
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from torchtune import config

from tests import hostile
from tests.formats import write_tar
from torchtune_vl.datasets import preference_pairs, vision_chat_dataset
from torchtune_vl.datasets._formats import FORMATS
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform

PAGE = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text(encoding="utf-8")
SECTIONS = {
    title: re.findall(r"```(\w+)\n(.*?)\n```", text, re.DOTALL)
    for title, text in re.findall(r"^### (.*)\n((?:(?!##).*\n)*)", PAGE, re.MULTILINE)
}
EXAMPLES = {title: blocks for title, blocks in SECTIONS.items() if blocks[0][0] != "yaml"}


def test_all_formats_have_an_example() -> None:
    assert SECTIONS.keys() - EXAMPLES.keys() == {"Tables"}  # which is of the hub
    assert yaml.safe_load(SECTIONS["Tables"][0][1])["dataset"]["source"] == "HuggingFaceM4/ChartQA"
    of_formats = {"chosen and rejected" if f in ("chosen", "rejected") else f for f in FORMATS}
    assert of_formats <= EXAMPLES.keys()


@pytest.fixture(scope="module")
def transform(vocabulary: Path) -> Qwen2_5_VLTransform:
    return Qwen2_5_VLTransform(vocabulary / "tokenizer.json", patch_dtype="uint8")


def png(name: str) -> bytes:
    return hostile.encode(Image.fromarray(hostile.noise(56, 84, 3, seed=sum(name.encode()))), "PNG")


def write(path: str, content: bytes) -> None:
    with fsspec.open(path, "wb", auto_mkdir=True) as file:
        file.write(content)


def write_listing(listing: str) -> None:
    """Files, and those of tars, of lines with a name and perhaps a content."""
    tars: dict[str, list[tuple[str, bytes]]] = {}
    for line in listing.splitlines():
        name, _, text = line.partition(": ")
        content = text.encode() + b"\n" if text else png(name.split("/")[-1])
        if ".tar/" in name:
            tar, member = name.split(".tar/")
            tars.setdefault(f"{tar}.tar", []).append((member, content))
        else:
            write(name, content)
    for tar, files in tars.items():
        Path(tar).parent.mkdir(parents=True, exist_ok=True)
        write_tar(Path(tar), files)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("title", EXAMPLES)
def test_examples(transform: Qwen2_5_VLTransform, tmp_path: Path, title: str) -> None:
    at = str(tmp_path)
    blocks = [
        (kind, text.replace("/data", at).replace("s3://bucket", "memory://page"))
        for kind, text in EXAMPLES[title]
    ]
    (kind, given), (_, settings), (_, told) = blocks
    component = yaml.safe_load(settings)["dataset"]
    conversation = json.loads(told)
    directory = component.get("media_dir") or at
    for name in conversation["images"]:
        path = name if name.startswith("/") else f"{directory}/{name}"
        write(path.replace(".tar/", "/"), png(name.split("/")[-1]))
    if kind == "json":
        write(component["data_files"], json.dumps(json.loads(given)).encode())
    else:
        write_listing(given)
    dataset = config.instantiate(
        OmegaConf.create({**component, "cache_dir": f"{at}/cache"}), transform
    )
    told = told.replace(".tar/", "/")
    write(f"{at}/told.jsonl", json.dumps(json.loads(told)).encode())
    expected = vision_chat_dataset(
        transform, source="json", data_files=f"{at}/told.jsonl", media_dir=directory
    )
    assert same(dataset[0], expected[0])
    for index in range(len(dataset)):
        assert dataset.measure(index)[0] == len(dataset[index]["tokens"])


def test_pairs_of_the_page(transform: Qwen2_5_VLTransform, tmp_path: Path) -> None:
    (_, record), _, _ = EXAMPLES["chosen and rejected"]
    (tmp_path / "cat.jpg").write_bytes(png("cat.jpg"))
    (tmp_path / "train.jsonl").write_text(json.dumps(json.loads(record)))
    data = str(tmp_path / "train.jsonl")
    pairs = preference_pairs(transform, source="json", data_files=data)
    ends = {
        answer: transform.decode([label for label in sample["labels"] if label != -100])
        for answer, sample in pairs[0].items()
    }
    assert ends == {"chosen": "A cat.<|im_end|>", "rejected": "A dog.<|im_end|>"}
    assert len(pairs) == 1
