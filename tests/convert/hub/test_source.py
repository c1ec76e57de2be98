"""What a SOURCE means, and which file names a repository may list."""

from pathlib import Path

import pytest
from exact_values import dsv4

from dsv4.convert.hub.client import check_remote_name, first_line
from dsv4.convert.hub.source import HubSource, parse_source, require_folder
from dsv4.errors import InputError, UsageError


@pytest.mark.parametrize(
    ("text", "hub", "repository", "revision"),
    [
        ("hf:deepseek-ai/DeepSeek-V4-Flash", "hf", "deepseek-ai/DeepSeek-V4-Flash", None),
        ("hf:org/name", "hf", "org/name", None),
        ("ms:org/name", "ms", "org/name", None),
        ("org/name@main", "hf", "org/name", "main"),
        ("ms:org/name@v1.0", "ms", "org/name", "v1.0"),
        ("hf:org/name@refs/pr/3", "hf", "org/name", "refs/pr/3"),
        ("hf://org/name", "hf", "org/name", None),
        ("hf://org/name@v1", "hf", "org/name", "v1"),
        ("ms://org/name@v1", "ms", "org/name", "v1"),
        ("https://huggingface.co/org/name", "hf", "org/name", None),
        ("https://huggingface.co/org/name/", "hf", "org/name", None),
        ("http://www.huggingface.co/org/name?library=vllm#files", "hf", "org/name", None),
        ("https://hf.co/org/name.git", "hf", "org/name", None),
        ("huggingface.co/org/name", "hf", "org/name", None),
        ("huggingface.co/org/name?not-for-all-audiences=true", "hf", "org/name", None),
        ("https://huggingface.co/org/name/tree/main", "hf", "org/name", "main"),
        ("https://huggingface.co/org/name/tree/main/inference", "hf", "org/name", "main"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F3", "hf", "org/name", "refs/pr/3"),
        ("https://huggingface.co/org/name/blob/v1.0/config.json", "hf", "org/name", "v1.0"),
        ("https://huggingface.co/org/name/resolve/abc123/config.json?download=true", "hf", "org/name", "abc123"),
        ("https://huggingface.co/org/name/commit/abc123", "hf", "org/name", "abc123"),
        ("https://huggingface.co/org/name/discussions/3", "hf", "org/name", None),
        ("https://modelscope.cn/models/org/name", "ms", "org/name", None),
        ("https://www.modelscope.cn/models/org/name/files", "ms", "org/name", None),
        ("https://modelscope.cn/models/org/name/summary?version=master", "ms", "org/name", None),
        ("https://modelscope.cn/models/org/name/tree/v2/inference", "ms", "org/name", "v2"),
        ("https://modelscope.cn/models/org/name/file/view/master/config.json?status=1", "ms", "org/name", "master"),
        ("https://modelscope.cn/models/org/name/resolve/master/config.json", "ms", "org/name", "master"),
        ("modelscope.ai/models/org/name", "ms", "org/name", None),
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
    ["https://huggingface.co", "https://huggingface.co/org", "https://huggingface.co/datasets/org/name",
     "https://huggingface.co/spaces/org/name", "https://modelscope.cn/datasets/org/name", "https://example.com/org/name",
     "https://huggingface.co.evil.com/org/name", "https://evil.com/huggingface.co/org/name", "https://[", "ftp://org/name",
     "https://huggingface.co/org/name/tree/..", "hf://datasets/org/name", "https://huggingface.co/or\x1bg/name",
     "", "name", "hf:", "hf:name", "hf:a/b/c", "ms:org/na me", "org/name@", "org/name@-x", "org/name@a..b",
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


@pytest.mark.parametrize(
    ("text", "source"),
    [("ms:org/name", "ms:org/name"), ("org/name", "hf:org/name"), ("https://hf.co/org/name/tree/x", "hf:org/name@x")],
)
def test_commands_that_need_a_folder(text: str, source: str, tmp_path: Path) -> None:
    assert require_folder(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match="does not exist") as error:
        require_folder(text)
    assert f"dsv4 download {source} FOLDER" in error.value.hint
    for missing in ("./nowhere", "nowhere", "/no/such"):
        with pytest.raises(InputError, match=f"{missing}: does not exist") as error:
            require_folder(missing)
        assert "download" not in error.value.hint


def test_a_name_with_one_slash_is_a_path_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`models/Flash` with a typo in it should not ask a hub; where a repository is all that helps, it is one."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    assert parse_source("models/Flahs") == Path("models/Flahs")
    assert parse_source("models/Flahs", remote=True) == HubSource("hf", "models/Flahs")
    assert parse_source("models/Flash@main") == HubSource("hf", "models/Flash", "main")
    assert parse_source("models/Flash", "main") == HubSource("hf", "models/Flash", "main")
    assert parse_source("hf:models/Flash") == HubSource("hf", "models/Flash")
    name = "deepseek-ai/DeepSeek-V4-Flash"
    assert parse_source(name) == Path(name) and parse_source(name, remote=True) == HubSource("hf", name)
    for command in (["convert", "models/Flahs", "out"], ["inspect", "models/Flahs"], ["verify", "models/Flahs", "."]):
        code, _, err = dsv4(*command)
        assert code == 3 and "models/Flahs: does not exist" in err and "hf:models/Flahs" in err


def test_the_mirror_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no hub that dsv4 knows"):
        parse_source("https://hf-mirror.example/org/name/tree/main")
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.example")
    assert parse_source("https://hf-mirror.example/org/name/tree/main") == HubSource("hf", "org/name", "main")


def test_what_a_library_says_in_another_language_is_named() -> None:
    class _DownloadDeadlineError(Exception):
        pass

    assert first_line(_DownloadDeadlineError("下载总时限已耗尽")) == "download deadline"
    assert first_line(_DownloadDeadlineError("timed out\nin thread 7")) == "timed out"
