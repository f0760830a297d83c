"""Make the files of this folder from full data: PYTHONPATH=. python tests/data/make.py ROWS GOLDEN TOKENIZER

ROWS holds `<Task>/{train,validation}.jsonl`, GOLDEN holds `<Task>.json` with the token ids that the MeZO code
gives, TOKENIZER is OPT's tokenizer (`vocab.json`, `merges.txt`, two configurations). README.md describes the
files that come out.
"""

import json
import shutil
import sys
from itertools import takewhile
from pathlib import Path

from tasks import get_task
from utils import load_tokenizer

HERE = Path(__file__).parent
TASKS = ("SST2", "RTE", "CB", "BoolQ", "WSC", "WIC", "MultiRC", "Copa", "ReCoRD", "SQuAD", "DROP")
CASES = ("zero_shot", "demos_2", "train", "sfc", "icl_sfc")
ROWS = {"train": 2, "validation": 3}  # the golden cases speak of the first rows of each split
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MORE_TEXTS = ("hello",)


def copy_rows(source: Path, folder: Path) -> None:
    """Copy the first lines of both splits byte for byte."""
    folder.mkdir(exist_ok=True)
    for split, count in ROWS.items():
        lines = (source / f"{split}.jsonl").read_bytes().splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_bytes(b"".join(lines[:count]))


def fold(encodings: list[list[int]], option_lens: list[int]) -> dict:
    """Write once what all candidates begin with."""
    columns = zip(*encodings, strict=False)
    beginning = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    endings = [ids[len(beginning) :] for ids in encodings]
    return {"beginning": beginning, "endings": endings, "option_lens": option_lens}


def write_golden(golden: list[dict], path: Path) -> None:
    """Write the golden rows, one a line, with the ids of a case folded."""
    rows = [{key: fold(*value) if key in CASES else value for key, value in row.items()} for row in golden]
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def prompts(task) -> set[str]:
    """Give the texts of all rows, without a candidate and with each one.

    Prompts without a candidate are counted but are in no golden case; training rows are there with the right
    candidate alone.
    """
    template = task.get_template()
    texts = set()
    for sample in (sample for split in ROWS for sample in task.samples[split]):
        texts |= {template.encode(sample), template.encode_sfc(sample)}
        for candidate in sample.candidates or [sample.correct_candidate]:
            texts |= {template.verbalize(sample, candidate), template.verbalize_sfc(sample, candidate)}
    return {text.strip(" ") for text in texts}


def cut_tokenizer(source: Path, folder: Path, used: set[int]) -> None:
    """Keep the bytes, the used tokens and the parts that used tokens are merged from, each at its id in OPT.

    A token of this vocabulary comes from one merge alone, so the kept merges are all that happen on the way
    to the used tokens, and the order of the kept merges is the order among all merges.
    """
    vocabulary = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    version, *merges = (source / "merges.txt").read_text(encoding="utf-8").splitlines()
    made_from = {merge.replace(" ", ""): merge.split(" ") for merge in merges}
    assert len(made_from) == len(merges)
    kept = {token for token, index in vocabulary.items() if index in used or len(token) == 1}
    kept |= set(SPECIALS)
    waiting = list(kept)
    while waiting:
        parts = made_from.get(waiting.pop(), [])
        waiting += set(parts) - kept
        kept |= set(parts)
    folder.mkdir(exist_ok=True)
    cut = {token: index for token, index in vocabulary.items() if token in kept}
    text = json.dumps(cut, ensure_ascii=False, indent=0, separators=(",", ":"))
    (folder / "vocab.json").write_text(text + "\n", encoding="utf-8")
    lines = [version, *(merge for merge in merges if merge.replace(" ", "") in kept)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, folder / name)


def main(rows: Path, golden: Path, tokenizer: Path) -> None:
    """Make everything and check that the cut tokenizer gives the ids of the full one."""
    full = load_tokenizer(tokenizer, "opt")
    texts = set(MORE_TEXTS)
    for name in TASKS:
        copy_rows(rows / name, HERE / name)
        golden_rows = json.loads((golden / f"{name}.json").read_text(encoding="utf-8"))
        write_golden(golden_rows, HERE / name / "golden.jsonl")
        encodings = [ids for row in golden_rows for case in CASES if case in row for ids in row[case][0]]
        texts |= {full.decode(ids, skip_special_tokens=True) for ids in encodings}
        texts |= prompts(get_task(name, HERE))
    expected = {text: full(text)["input_ids"] for text in sorted(texts)}
    cut_tokenizer(tokenizer, HERE / "tokenizer", {index for ids in expected.values() for index in ids})
    cut = load_tokenizer(HERE / "tokenizer", "opt")
    assert all(cut(text)["input_ids"] == ids for text, ids in expected.items())
    sizes = [path.stat().st_size for path in HERE.rglob("*") if path.is_file()]
    print(f"{len(sizes)} files, {sum(sizes) / 1e3:.0f} kB")
    print(f"{len(cut.get_vocab())} of {len(full.get_vocab())} tokens; {len(texts)} texts get the same ids")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
