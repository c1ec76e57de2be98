"""What a SOURCE means, and which file names a repository may list."""

from pathlib import Path

import pytest

from dsv4.convert.checkpoint.source import HubSource, download_hint, parse_source
from dsv4.convert.hub.client import check_remote_name
from dsv4.errors import InputError, UsageError


@pytest.mark.parametrize(
    ("text", "hub", "repository", "revision"),
    [
        ("deepseek-ai/DeepSeek-V4-Flash", "hf", "deepseek-ai/DeepSeek-V4-Flash", None),
        ("hf:org/name", "hf", "org/name", None),
        ("ms:org/name", "ms", "org/name", None),
        ("org/name@main", "hf", "org/name", "main"),
        ("ms:org/name@v1.0", "ms", "org/name", "v1.0"),
        ("hf:org/name@refs/pr/3", "hf", "org/name", "refs/pr/3"),
    ],
)
def test_repositories(text: str, hub: str, repository: str, revision: str | None) -> None:
    source = parse_source(text)
    assert isinstance(source, HubSource)
    assert (source.hub, source.repository, source.revision) == (hub, repository, revision)
    assert parse_source(str(source)) == source


def test_a_folder_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    Path("hf:org").mkdir()
    assert parse_source("org/name") == Path("org/name")
    assert parse_source("hf:org") == Path("hf:org")
    assert isinstance(parse_source("hf:org/name"), HubSource)


@pytest.mark.parametrize("text", ["./org/name", "/no/such", "~/x", "../x", "a/b/c", "org/"])
def test_paths_are_left_to_whoever_opens_them(text: str) -> None:
    assert parse_source(text) == Path(text)


@pytest.mark.parametrize(
    "text",
    ["", "name", "hf:", "hf:name", "hf:a/b/c", "ms:org/na me", "org/name@", "org/name@-x", "org/name@a..b",
     "s3:org/name", "org/..", "hf:org/a--b", "hf:org/name\x1b[2J", "org\0/name", "hf:/name", "hf:-o/name"],
)  # fmt: skip
def test_nonsense_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_source(text)
    assert "\x1b" not in str(error.value)


def test_revision_option() -> None:
    assert parse_source("org/name", "dev") == HubSource("hf", "org/name", "dev")
    assert parse_source("org/name@dev", "dev") == HubSource("hf", "org/name", "dev")
    with pytest.raises(UsageError, match="two revisions"):
        parse_source("org/name@main", "dev")
    with pytest.raises(UsageError, match="is a folder"):
        parse_source("./x", "dev")


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/../../evil", "/etc/passwd", "a//b", "", ".", "..", "C:\\x", "C:x", "\\\\host\\share", "a\\b",
     "a\nb", "a\0b", "\x1b[2J", "a/.", "x" * 300, "a ", "a.", ".dsv4-incoming/x", ".dsv4-source.json", "a\u202eb"],
)  # fmt: skip
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="refusing the file name"):
        check_remote_name(name, "hf:org/name")


@pytest.mark.parametrize("name", ["config.json", ".gitattributes", "inference/config.json", "a b.txt", "模型.md"])
def test_ordinary_names_pass(name: str) -> None:
    check_remote_name(name, "hf:org/name")


def test_hint_for_commands_that_need_a_folder(tmp_path: Path) -> None:
    assert "dsv4 download ms:org/name FOLDER" in download_hint("ms:org/name")
    assert download_hint(str(tmp_path)) == download_hint("./nowhere") == download_hint("nowhere") == ""
