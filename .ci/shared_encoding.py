"""Checks prompts and parsed completions against what the releases' own encoders give, where their cases lie.

    python .ci/shared_encoding.py FOLDER

Each JSON file in FOLDER holds the cases of one edition: messages with the options of `encode_messages` and the prompt
or an error, completions with the message or an error. Every prompt must have the same bytes, every error must be
refused with a message.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4.errors import Dsv4Error
from dsv4.model import encode_messages, parse_completion

Case = dict[str, Any]


def is_right(case: Case, expected: str, compute: Callable[[], Any]) -> bool:
    """Whether `compute` gives the expected value, or refuses where the release does."""
    try:
        return bool(compute() == case.get(expected))
    except Dsv4Error as error:
        return bool(case.get("error")) and bool(str(error))


def wrong_cases(edition: str, cases: dict[str, list[Case]]) -> list[str]:
    """The names of the cases that dsv4 gets wrong."""

    def encode(case: Case) -> str:
        return encode_messages(case["messages"], edition=edition, **case["options"])

    def parse(case: Case) -> dict[str, Any]:
        return parse_completion(case["text"], case["thinking_mode"], edition=edition)

    wrong = [f"encode {c['name']}" for c in cases["encode"] if not is_right(c, "prompt", lambda c=c: encode(c))]
    return wrong + [f"parse {c['name']}" for c in cases["parse"] if not is_right(c, "message", lambda c=c: parse(c))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    paths = sorted(parser.parse_args().folder.glob("*.json"))
    failed = not paths
    for path in paths:
        cases = json.loads(path.read_text(encoding="utf-8"))
        wrong = wrong_cases(cases["edition"], cases)
        count = len(cases["encode"]) + len(cases["parse"])
        print(f"{path.name}: edition {cases['edition']}, {count - len(wrong)} of {count} cases right")
        for name in wrong:
            print(f"  wrong: {name}")
        failed = failed or bool(wrong)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
