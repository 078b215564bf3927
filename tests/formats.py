"""Generated conversations, written in the formats and to the sources that can hold them."""

import base64
import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import fsspec
from PIL import Image

from tests import hostile

Record = dict[str, Any]
# What a writer gives: settings of the dataset, and the indices of the conversations in it
Written = tuple[dict[str, Any], list[int]]
DESCRIBE = "Describe it.\nBriefly, please."
FIND = "Find all objects."
TOOLS = [
    {"type": "function", "function": {"name": "zoom", "parameters": {"properties": {"by": {}}}}}
]
WORDS = (
    "cat",
    "a red car",
    "猫",
    "über",
    "x = {1: [2]}",
    "  ",
    "<b>",
    "\n\n",
    "№ 7",
    "é",
    "<image",
)
SIZES = [(56, 84), (60, 100), (112, 56), (77, 91), (28, 112)]
IMAGES = [f"{'ünter/' if i % 2 else ''}bild {i}.{('png', 'jpg')[i % 3 == 0]}" for i in range(6)]
VIDEO = "clips/v.mp4"
KINDS = ("text", "image", "images", "video", "boxes", "turns", "tools", "system", "caption", "find")


def write_media(directory: Path) -> None:
    for number, name in enumerate(IMAGES):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = SIZES[number % len(SIZES)]
        Image.fromarray(hostile.noise(height, width, 3, seed=number)).save(path)
    (directory / VIDEO).parent.mkdir(exist_ok=True)
    (directory / VIDEO).write_bytes(hostile.encode_video("mp4", "libx264", 6))


def generate(seed: int = 0, count: int = 60) -> list[Record]:
    """Records in the chat format of transformers, with media by path; each of one kind in turn."""
    rng = random.Random(seed)
    return [_record(rng, KINDS[number % len(KINDS)]) for number in range(count)]


def _words(rng: random.Random) -> str:
    return "What is " + " ".join(rng.choices(WORDS, k=rng.randint(1, 5))) + "?"


def _image(rng: random.Random) -> Record:
    return {"type": "image", "image": rng.choice(IMAGES)}


def _text(text: str) -> Record:
    return {"type": "text", "text": text}


def _turn(question: list[Record], answer: Any) -> list[Record]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _record(rng: random.Random, kind: str) -> Record:
    question, answer = [_text(_words(rng))], f"It is <image> {rng.randint(0, 99)}, {_words(rng)}"
    if kind == "image":
        question.insert(rng.randint(0, 1), _image(rng))
    if kind == "images":
        for _ in range(rng.randint(2, 4)):
            question.insert(rng.choice((0, 0, len(question))), _image(rng))
        question.append(_text(_words(rng)))
    if kind == "video":
        question = [{"type": "video", "video": VIDEO}, *question]
    if kind in ("boxes", "find"):
        question = [_image(rng), _text(FIND if kind == "find" else _words(rng))]
        return {"messages": _turn(question, [_boxes(rng, question[0]["image"])])}
    if kind == "caption":
        question = [_image(rng), _text(DESCRIBE)]
    messages = _turn(question, answer)
    if kind == "turns":
        for _ in range(rng.randint(1, 2)):
            more = [_image(rng), _text(_words(rng))][rng.randint(0, 1) :]
            messages += _turn(more, _words(rng))
    if kind == "system":
        system = [{"role": "system", "content": "Be brief. " + _words(rng)}]
        return {"messages": system + _turn([_image(rng), *question], answer)}
    if kind == "tools":
        call = {"name": "zoom", "arguments": {"by": rng.randint(2, 9), "of": None}}
        messages[1:1] = [
            {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
            {"role": "tool", "content": "done"},
        ]
        return {"messages": messages, "tools": TOOLS}
    return {"messages": messages}


def _boxes(rng: random.Random, image: str) -> Record:
    height, width = SIZES[IMAGES.index(image) % len(SIZES)]
    entries = []
    for _ in range(rng.randint(1, 3)):
        x, y = rng.randint(0, width // 2), rng.randint(0, height // 2)
        corners = [x, y, rng.randint(x, width), rng.randint(y, height)]
        entries.append({"bbox_2d": corners, "label": rng.choice(("cat", "red car", "猫"))})
    return {"type": "boxes", "boxes": entries}


# From a record to columns


def items_of(message: Record) -> list[Record]:
    content = message["content"]
    return [_text(content)] if isinstance(content, str) else content


def media_of(record: Record) -> list[tuple[str, str]]:
    items = [item for message in record["messages"] for item in items_of(message)]
    return [(i["type"], i[i["type"]]) for i in items if i["type"] in ("image", "video")]


def tagged(record: Record) -> tuple[list[Record], Record]:
    """Messages of texts with tags, and the columns of what they stand for."""
    columns: Record = {}
    messages = []
    for message in record["messages"]:
        text = ""
        for item in items_of(message):
            if item["type"] == "text":
                text += item["text"]
            elif item["type"] == "boxes":
                text += _tags_of_boxes(item["boxes"], columns)
            else:
                text += f"<{item['type']}>"
                columns.setdefault(f"{item['type']}s", []).append(item[item["type"]])
        messages.append({**message, "content": text})
    if "tools" in record:
        columns["tools"] = record["tools"]
    return messages, columns


def _tags_of_boxes(boxes: list[Record], columns: Record) -> str:
    columns["objects"] = {
        "ref": [box["label"] for box in boxes],
        "bbox": [box["bbox_2d"] for box in boxes],
    }
    line = '\t{"bbox_2d": <bbox>, "label": "<ref-object>"}'
    return "```json\n[\n" + ",\n".join([line] * len(boxes)) + "\n]\n```"


def _pieces(record: Record) -> tuple[str | None, list[Record], Record]:
    """The system's text, the other messages, and columns, without tags where media come first."""
    messages, columns = tagged(record)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    first, count = messages[0], len(media_of(record))
    kind = "video" if "videos" in columns else "image"
    if first["content"].startswith(f"<{kind}>" * count):
        tags = f"<{kind}>" * count
        others = messages[1:]
        if not any(f"<{kind}>" in m["content"] for m in others if m["role"] == "user"):
            messages = [{**first, "content": first["content"].removeprefix(tags)}, *others]
    return system, messages, columns


def as_swift(record: Record) -> Record:
    messages, columns = tagged(record)
    return {"messages": messages, **columns}


def as_sharegpt(record: Record) -> Record:
    messages, columns = tagged(record)
    speakers = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    turns = []
    for message in messages:
        if "tool_calls" in message:
            call = message["tool_calls"][0]["function"]
            turns.append({"from": "function_call", "value": json.dumps(call)})
        else:
            turns.append({"from": speakers[message["role"]], "value": message["content"]})
    columns["tools"] = json.dumps(columns["tools"]) if "tools" in columns else None
    return {"conversations": turns, **columns}


def as_openai(record: Record, directory: Path) -> Record:
    """With images inline, as data URLs."""

    def part(item: Record) -> Record:
        if item["type"] == "video":
            return {"type": "video_url", "video_url": {"url": item["video"]}}
        if item["type"] != "image":
            return item
        data = base64.b64encode((directory / item["image"]).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    messages = [{**m, "content": [*map(part, items_of(m))]} for m in record["messages"]]
    return {**record, "messages": messages}


def with_columns_of_media(record: Record) -> Record:
    """Items without a source, which take those of the columns."""
    columns: Record = {}
    for kind, source in media_of(record):
        columns.setdefault(f"{kind}s", []).append(source)
    bare = [
        {
            **message,
            "content": [
                {"type": item["type"]} if item["type"] in ("image", "video") else item
                for item in items_of(message)
            ],
        }
        for message in record["messages"]
    ]
    return {**record, "messages": bare, **columns}


def as_alpaca(record: Record) -> Record | None:
    if "tools" in record:
        return None
    system, messages, columns = _pieces(record)
    texts = [message["content"] for message in messages]
    pairs = [*zip(texts[::2], texts[1::2], strict=True)]
    *history, (question, answer) = pairs
    instruction, line, rest = question.partition("\n")
    if not line or not rest:  # an empty input is none
        instruction, rest = question, ""
    columns |= {"instruction": instruction, "input": rest, "output": answer}
    return {**columns, "history": [[*pair] for pair in history], "system": system}


def as_prompt_and_completion(record: Record) -> Record:
    system, messages, columns = _pieces(record)
    return {"prompt": messages[:1], "completion": messages[1:], "system": system, **columns}


def as_plain_prompt(record: Record) -> Record | None:
    system, messages, columns = _pieces(record)
    if len(messages) > 2:
        return None
    question, answer = (message["content"] for message in messages)
    return {"prompt": question, "completion": answer, "system": system, **columns}


def as_vqa(record: Record) -> Record | None:
    plain = as_plain_prompt(record)
    if plain is None:
        return None
    return {"question": plain.pop("prompt"), "answer": plain.pop("completion"), **plain}


def as_vqa_of_many(record: Record) -> Record | None:
    plain = as_vqa(record)
    if plain is None:
        return None
    answer = plain.pop("answer")
    others = [{"answer": each} for each in ("no", answer, "yes", answer)]
    return {**plain, "answers": others}


def as_pair(record: Record) -> Record:
    system, messages, columns = _pieces(record)
    pair = {"chosen": messages[1:], "rejected": [{"role": "assistant", "content": "No."}]}
    return {"prompt": messages[:1], **pair, "system": system, **columns}


def as_caption(record: Record, column: str = "caption") -> Record | None:
    question = record["messages"][0]["content"]
    if question[-1] != _text(DESCRIBE):
        return None
    return {"image": question[0]["image"], column: record["messages"][1]["content"]}


# From records to files


def jsonl(name: str, change: Callable[[Record], Record | None], **settings: Any) -> Any:
    """A writer of one line for each conversation that a format can hold."""

    def write(records: list[Record], directory: Path) -> Written:
        lines = [(i, line) for i, r in enumerate(records) if (line := change(r)) is not None]
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for _, line in lines))
        return {"source": "json", "data_files": str(path), **settings}, [i for i, _ in lines]

    return write


def openai(records: list[Record], directory: Path) -> Written:
    return jsonl("openai", lambda record: as_openai(record, directory))(records, directory)


def array(records: list[Record], directory: Path) -> Written:
    path = directory / "array.json.gz"
    path.write_bytes(gzip.compress(json.dumps(records, indent=1).encode()))
    return {"source": "json", "data_files": str(path)}, [*range(len(records))]


def _table(records: list[Record], directory: Path) -> datasets.Dataset:
    """Messages as JSON text, and images as bytes in a column of images."""
    features = datasets.Features(
        {
            "messages": datasets.Value("string"),
            "tools": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "videos": datasets.List(datasets.Value("string")),
        }
    )
    rows = []
    for record in map(with_columns_of_media, records):
        images = [
            {"bytes": (directory / name).read_bytes(), "path": name}
            for name in record.get("images", [])
        ]
        row = {"images": images, "videos": record.get("videos")}
        tools = json.dumps(record["tools"]) if "tools" in record else None
        rows.append({**row, "messages": json.dumps(record["messages"]), "tools": tools})
    return datasets.Dataset.from_list(rows, features=features)


def parquet(records: list[Record], directory: Path) -> Written:
    path = directory / "table.parquet"
    _table(records, directory).to_parquet(path)
    return {"source": "parquet", "data_files": str(path)}, [*range(len(records))]


def saved(records: list[Record], directory: Path) -> Written:
    _table(records, directory).save_to_disk(directory / "saved")
    settings = {"source": str(directory / "saved"), "media_dir": str(directory)}
    return settings, [*range(len(records))]


def typed_parquet(records: list[Record], directory: Path) -> Written:
    """Columns with types of their own, where null is what a conversation has not."""
    held = [i for i, record in enumerate(records) if "tools" not in record]
    rows = [as_alpaca(records[i]) or {} for i in held]
    keys = {key for row in rows for key in row}  # a table has those of its first row
    rows = [{key: row.get(key) for key in keys} for row in rows]
    path = directory / "typed.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    return {"source": "parquet", "data_files": str(path)}, held


def coco(records: list[Record], directory: Path) -> Written:
    held = [i for i, r in enumerate(records) if r["messages"][0]["content"][-1] == _text(FIND)]
    labels = ["cat", "red car", "猫"]
    file: Record = {"images": [], "annotations": []}
    file["categories"] = [{"id": 7 + i, "name": label} for i, label in enumerate(labels)]
    for i in held:
        question, answer = records[i]["messages"]
        file["images"].append({"id": i, "file_name": question["content"][0]["image"]})
        crowd = {"image_id": i, "category_id": 7, "bbox": [0, 0, 1, 1], "iscrowd": 1}
        file["annotations"].append(crowd)
        for box in answer["content"][0]["boxes"]:
            x1, y1, x2, y2 = box["bbox_2d"]
            category = 7 + labels.index(box["label"])
            of_image = {"image_id": i, "category_id": category, "iscrowd": 0}
            file["annotations"].append({**of_image, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    path = directory / "instances.json"
    path.write_text(json.dumps(file))
    return {"source": "json", "data_files": str(path), "prompt": FIND}, held


Content = dict[str, bytes]  # of files by name


def _beside(record: Record, number: int, directory: Path) -> tuple[Record, Content]:
    """A record with the names of media beside it; that of a single medium is left out."""
    files: Content = {}
    stem, media = f"rec {number:05}", media_of(record)

    def part(item: Record) -> Record:
        kind = item["type"]
        if kind not in ("image", "video"):
            return item
        source = item[kind]
        suffix = Path(source).suffix
        name = f"{stem}{suffix}" if len(media) == 1 else f"{stem}.{len(files)}{suffix}"
        files[name] = (directory / source).read_bytes()
        return {"type": kind} if len(media) == 1 else {"type": kind, kind: name}

    messages = [{**m, "content": [*map(part, items_of(m))]} for m in record["messages"]]
    return {**record, "messages": messages}, files


def _captions(records: list[Record], directory: Path) -> tuple[Content, list[int]]:
    files: Content = {"read me.cls": b"?", ".hidden.txt": b"?"}
    held = []
    for number, record in enumerate(records):
        if caption := as_caption(record):
            path = Path(caption["image"])
            held.append(number)
            files[f"{number:03} ö{path.suffix}"] = (directory / path).read_bytes()
            files[f"{number:03} ö.txt"] = caption["caption"].encode() + b"\n"
    return files, held


def folder(records: list[Record], directory: Path) -> Written:
    files, held = _captions(records, directory)
    for name, content in files.items():
        path = directory / "folder" / name[:2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {"source": "folder", "data_files": str(directory / "folder"), "prompt": DESCRIBE}, held


def folder_of_json(records: list[Record], directory: Path) -> Written:
    root = directory / "records"
    root.mkdir(exist_ok=True)
    held = [i for i, record in enumerate(records) if len(media_of(record)) < 2]
    for number in held:
        record, files = _beside(records[number], number, directory)
        for name, content in files.items():
            (root / name).write_bytes(content)
        (root / f"rec {number:05}.json").write_text(
            json.dumps(record["messages"] if "tools" not in record else record)
        )
    return {"source": "folder", "data_files": str(root)}, held


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def tars(records: list[Record], directory: Path) -> Written:
    """Two, where all records come before all media, which are in another order."""
    half = len(records) // 2
    for shard in (0, 1):
        texts: Content = {}
        media: Content = {}
        for number in range(shard * half, shard * half + half):
            record, beside = _beside(records[number], number, directory)
            texts[f"./a/rec {number:05}.json"] = json.dumps(record).encode()
            media |= {f"./a/{name}": content for name, content in beside.items()}
        write_tar(directory / f"shard {shard:03}.tar", [*texts.items(), *[*media.items()][::-1]])
    pattern = str(directory / "shard {000..001}.tar")
    return {"source": "webdataset", "data_files": pattern}, [*range(2 * half)]


def captions_in_a_tar(records: list[Record], directory: Path) -> Written:
    files, held = _captions(records, directory)
    write_tar(directory / "captions.tar", files.items())
    tar = str(directory / "captions.tar")
    return {"source": "webdataset", "data_files": tar, "prompt": DESCRIBE}, held


def store(records: list[Record], directory: Path) -> Written:
    """JSON Lines in a store of fsspec, and their media beside them."""
    fs = fsspec.filesystem("memory")
    lines = [json.dumps(with_columns_of_media(record)) for record in records]
    fs.pipe("/bucket/train.jsonl", "\n".join(lines).encode())
    for name in (*IMAGES, VIDEO):
        fs.pipe(f"/bucket/{name}", (directory / name).read_bytes())
    return {"source": "json", "data_files": "memory://bucket/*.jsonl"}, [*range(len(records))]


def media_in_a_store(records: list[Record], directory: Path) -> Written:
    store(records, directory)
    settings, held = jsonl("elsewhere", with_columns_of_media)(records, directory)
    return {**settings, "media_dir": "memory://bucket"}, held


def tar_in_a_store(records: list[Record], directory: Path) -> Written:
    settings, held = captions_in_a_tar(records, directory)
    content = Path(settings["data_files"]).read_bytes()
    fsspec.filesystem("memory").pipe("/tars/captions 0.tar", content)
    return {**settings, "data_files": "memory://tars/*.tar"}, held


def folder_in_a_store(records: list[Record], directory: Path) -> Written:
    files, held = _captions(records, directory)
    for name, content in files.items():
        fsspec.filesystem("memory").pipe(f"/folder/{name}", content)
    return {"source": "folder", "data_files": "memory://folder", "prompt": DESCRIBE}, held


def saved_in_a_store(records: list[Record], directory: Path) -> Written:
    _table(records, directory).save_to_disk("memory://saved")
    return {"source": "memory://saved", "media_dir": str(directory)}, [*range(len(records))]


WRITERS: dict[str, Callable[[list[Record], Path], Written]] = {
    "messages": jsonl("messages", lambda record: record),
    "an array, compressed": array,
    "lists of messages": jsonl("lists", lambda r: None if "tools" in r else r["messages"]),
    "OpenAI": openai,
    "columns of media": jsonl("columns", with_columns_of_media),
    "ms-swift": jsonl("swift", as_swift),
    "ShareGPT": jsonl("sharegpt", as_sharegpt),
    "parquet": parquet,
    "parquet, streamed": lambda *args: (
        {**parquet(*args)[0], "streaming": True},
        parquet(*args)[1],
    ),
    "typed parquet": typed_parquet,
    "save_to_disk": saved,
    "alpaca": jsonl("alpaca", as_alpaca),
    "prompt and completion": jsonl("trl", as_prompt_and_completion),
    "plain prompt and completion": jsonl("plain", as_plain_prompt),
    "vqa": jsonl("vqa", as_vqa),
    "vqa, several answers": jsonl("answers", as_vqa_of_many),
    "caption": jsonl("caption", as_caption, prompt=DESCRIBE),
    "text": jsonl("text", lambda record: as_caption(record, "text"), prompt=DESCRIBE),
    "coco": coco,
    "chosen": jsonl("pairs", as_pair, format="chosen"),
    "folder": folder,
    "folder of JSON": folder_of_json,
    "tars": tars,
    "tar of captions": captions_in_a_tar,
    "store": store,
    "media in a store": media_in_a_store,
    "tar in a store": tar_in_a_store,
    "folder in a store": folder_in_a_store,
    "save_to_disk in a store": saved_in_a_store,
}
