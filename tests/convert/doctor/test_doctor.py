"""`dsv4 doctor`: each rule by damage, and `transformers` loading what its row says that it loads."""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_values import edit_tensors, tensors_of
from foreign_checkpoints import KINDS, foreign
from mixed_scales import mix_scales
from raw_safetensors import raw
from release_headers import FLASH, make_released
from safetensors.torch import load_file, save_file
from tiny import RAGGED

from dsv4 import cli
from dsv4.convert.doctor.diagnosis import Diagnosis, diagnose
from dsv4.convert.plan.engines import ENGINES
from dsv4.convert.synthetic.checkpoint import Geometry, V41Geometry, make_checkpoint
from dsv4.errors import UsageError

SMALL = Geometry(compress_ratios=(0, 4, 128, 0), n_routed_experts=4)
TARGETS = ("base", "vllm", "sglang", "transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doctor")


@pytest.fixture(scope="module")
def release(folder: Path) -> Path:
    return make_checkpoint(folder / "release", geometry=SMALL)


@pytest.fixture(scope="module")
def converted(folder: Path, release: Path) -> Callable[..., Path]:
    """Converts the release once for each set of options."""

    def convert(*options: str) -> Path:
        output = folder / ("converted" + "".join(options))
        if not output.exists():
            assert cli.run(["convert", str(release), str(output), *options, "-q"]) == 0
        return output

    return convert


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a folder with other config keys (... removes one) and without some files."""

    def edit(source: Path, *removed: str, **keys: object) -> Path:
        copy = Path(shutil.copytree(source, tmp_path / "copy"))
        config = json.loads((copy / "config.json").read_text()) | keys
        (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        for name in removed:
            (copy / name).unlink()
        return copy

    return edit


def failures(diagnosis: Diagnosis) -> set[str]:
    return {check.rule for check in diagnosis.checks if check.status in ("wrong", "refuses", "unknown")}


@pytest.mark.parametrize("engine", ["sglang", "vllm", "transformers"])
@pytest.mark.fast_cases(1)
def test_what_is_converted_for_an_engine_loads_there(converted: Callable[..., Path], engine: str) -> None:
    assert diagnose(converted("--target", engine), engine, 1).loads
    assert diagnose(converted("--target", "vllm"), engine, 1).loads  # one folder for all three
    assert diagnose(converted(), engine).loads


@pytest.mark.parametrize("engine", ["sglang", "vllm", "transformers"])
@pytest.mark.fast_cases(1)
def test_the_release_and_base_load_everywhere(release: Path, tmp_path: Path, engine: str) -> None:
    assert diagnose(release, engine).loads
    assert diagnose(make_checkpoint(tmp_path / "base", geometry=SMALL, experts="fp8"), engine).loads


@pytest.mark.parametrize("options", [(), ("--to", "same")])
@pytest.mark.fast_cases(1)
def test_rank_files_load_in_the_reference_engine(converted: Callable[..., Path], options: tuple[str, ...]) -> None:
    ranks = converted(*options, "--layout", "mp", "--model-parallel", "2")
    assert diagnose(ranks, "reference", 2).loads
    assert failures(diagnose(ranks, "reference", 4)) == {"tensor parallel"}
    assert failures(diagnose(ranks, "vllm")) == {"layout"}


def test_a_folder_is_not_for_the_reference_engine(release: Path) -> None:
    (check,) = diagnose(release, "reference", 2).checks
    assert check.status == "refuses"
    assert check.command == f"dsv4 convert {release} NEW --to same --layout mp --model-parallel 2"


def test_damage_to_rank_files(converted: Callable[..., Path], edited: Callable[..., Path]) -> None:
    ranks = converted("--to", "same", "--layout", "mp", "--model-parallel", "2")
    copy = edited(ranks, expert_dtype=...)
    assert failures(diagnose(copy, "reference")) == {"expert_dtype"}
    tensors = load_file(copy / "model1-mp2.safetensors")
    del tensors["norm.weight"], tensors["layers.0.ffn.experts.3.w1.weight"], tensors["layers.0.ffn.experts.3.w1.scale"]
    tensors = {name: t for name, t in tensors.items() if ".experts.3." not in name}
    save_file(tensors, copy / "model1-mp2.safetensors")
    texts = [check.text for check in diagnose(copy, "reference").checks if check.rule == "tensors"]
    assert any("norm.weight is not in every rank" in text for text in texts)
    assert any("routed experts" in text for text in texts)
    (copy / "model1-mp2.safetensors").unlink()
    assert failures(diagnose(copy, "reference")) == {"files"}


def quantization(**keys: object) -> dict:
    released = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0"}
    return {k: v for k, v in (released | {"weight_block_size": [128, 128]} | keys).items() if v is not ...}


def ignoring(*prefixes: str) -> list[str]:
    """`ignored_layers` that names wo_a of every layer, with each of these in front."""
    return [f"{prefix}layers.{layer}.attn.wo_a" for layer in range(3) for prefix in prefixes]


BF16_WO_A = ("--target", "vllm", "--wo-a", "bf16")
DAMAGE = [
    # the release, which is FP4
    ((), "vllm", {"expert_dtype": "fp8"}, (), "expert_dtype"),
    ((), "vllm", {"expert_dtype": ...}, (), None),
    ((), "transformers", {"expert_dtype": ...}, (), "expert_dtype"),
    ((), "sglang", {"expert_dtype": ...}, (), None),
    ((), "transformers", {"model_type": "deepseek_v41"}, (), "architecture"),
    ((), "sglang", {"architectures": ["Other"]}, (), "architecture"),
    ((), "transformers", {"quantization_config": quantization(scale_fmt="f32")}, (), "quantization_config"),
    ((), "vllm", {"quantization_config": ...}, (), "quantization_config"),
    ((), "vllm", {"quantization_config": quantization(weight_block_size=...)}, (), "quantization_config"),
    ((), "sglang", {"hidden_size": 128}, (), "tensors"),
    ((), "vllm", {}, ("tokenizer.json",), "side files"),
    ((), "transformers", {}, ("tokenizer.json",), None),
    ((), "sglang", {}, ("model-00003-of-00006.safetensors",), "files"),
    # FP8
    (("--target", "vllm"), "vllm", {"expert_dtype": ...}, (), "expert_dtype"),
    (("--target", "vllm"), "transformers", {"expert_dtype": ...}, (), None),
    (("--target", "sglang"), "sglang", {}, (), None),
    (("--target", "transformers"), "vllm", {}, (), "expert scales"),
    (BF16_WO_A, "vllm", {}, (), "wo_a"),
    # BF16
    (("--to", "bf16"), "transformers", {}, (), None),
    (("--to", "bf16"), "transformers", {"quantization_config": quantization()}, (), "quantization_config"),
    (("--to", "bf16"), "vllm", {}, (), None),
    (("--to", "bf16"), "sglang", {}, (), None),
    # BF16 wo_a beside FP8
    (BF16_WO_A, "vllm", {"quantization_config": quantization(ignored_layers=ignoring("", "model."))}, (), None),
    (BF16_WO_A, "vllm", {"quantization_config": quantization(ignored_layers=ignoring(""))}, (), None),
    (BF16_WO_A, "vllm", {"quantization_config": quantization(ignored_layers=ignoring("model.")[1:])}, (), "wo_a"),
    (BF16_WO_A, "vllm", {"quantization_config": quantization(ignored_layers="layers")}, (), "wo_a"),
    (BF16_WO_A, "sglang", {}, (), None),
]


@pytest.mark.parametrize(("options", "engine", "keys", "removed", "rule"), DAMAGE)
@pytest.mark.fast_cases(8)
def test_rules(
    release: Path,
    converted: Callable[..., Path],
    edited: Callable[..., Path],
    options: tuple[str, ...],
    engine: str,
    keys: dict,
    removed: tuple[str, ...],
    rule: str | None,
) -> None:
    diagnosis = diagnose(edited(converted(*options) if options else release, *removed, **keys), engine)
    assert (diagnosis.loads is True) == (rule is None)
    assert rule is None or rule in failures(diagnosis)


def test_bf16_wo_a_is_wrong_unless_the_config_says_so(
    converted: Callable[..., Path], edited: Callable[..., Path]
) -> None:
    def status(folder: Path) -> str:
        return next(check.status for check in diagnose(folder, "vllm").checks if check.rule == "wo_a")

    folder = converted(*BF16_WO_A)
    assert status(folder) == "wrong"
    some = quantization(ignored_layers=ignoring("")[:2])
    assert status(edited(folder, quantization_config=some)) == "unknown"


def test_what_vllm_does_not_take(tmp_path: Path) -> None:
    wide = make_checkpoint(tmp_path / "wide", geometry=replace(SMALL, head_dim=256))
    assert failures(diagnose(wide, "vllm")) == {"architecture"}
    assert diagnose(wide, "sglang").loads
    narrow = replace(SMALL, moe_intermediate_size=128)  # 64 for each of two ranks: half a block
    fp4 = make_checkpoint(tmp_path / "fp4", geometry=narrow)
    fp8 = make_checkpoint(tmp_path / "fp8", geometry=narrow, experts="fp8")
    assert diagnose(fp4, "vllm", 2).loads  # vLLM pads them
    assert failures(diagnose(fp8, "vllm", 2)) == {"tensor parallel"}
    assert failures(diagnose(fp8, "sglang", 2)) == {"tensor parallel"}


def test_a_verdict_says_what_the_rules_were_checked_against(
    release: Path, converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = converted("--to", "same", "--layout", "mp", "--model-parallel", "2")
    for folder, engine in ((release, "vllm"), (release, "sglang"), (release, "transformers"), (ranks, "reference")):
        evidence = ENGINES[engine].evidence
        assert cli.run(["doctor", str(folder), "--for", engine, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["checked"] == (asdict(evidence) if evidence else None)
        assert cli.run(["doctor", str(folder), "--for", engine]) == 0
        said = " ".join(capsys.readouterr().out.split())
        wanted = f"{evidence.version}, checked {evidence.date} ({evidence.executed})" if evidence else "not checked"
        assert wanted in said and "will" not in said


def test_a_mixture_of_experts_formats_is_wrong_everywhere(tmp_path: Path) -> None:
    source = mix_scales(make_checkpoint(tmp_path / "mixed", geometry=SMALL))
    output = tmp_path / "kept"
    assert cli.run(["convert", str(source), str(output), "--on-inexact", "keep", "-q"]) == 0
    for engine in ("sglang", "vllm", "transformers"):
        assert "experts" in failures(diagnose(output, engine))


def test_a_dense_weight_without_a_scale_beside_others_is_wrong_everywhere(
    release: Path, edited: Callable[..., Path]
) -> None:
    """As `--on-inexact keep` leaves one that has no exact form in FP8."""
    name, copy = "layers.1.attn.wq_a", edited(release)
    shape = tensors_of(copy)[f"{name}.weight"].shape
    edit_tensors(copy, {f"{name}.weight": raw("BF16", np.ones(shape, np.uint16))}, drop=(f"{name}.scale",))
    for engine in ("sglang", "vllm", "transformers"):
        diagnosis = diagnose(copy, engine)
        assert failures(diagnosis) == {"dense weights"}
        assert any(
            f"1 dense weight without a block scale beside others in FP8 ({name}.weight)" in c.text
            for c in diagnosis.checks
        )


@pytest.mark.slow
def test_flash_over_many_ranks(tmp_path: Path) -> None:
    flash = make_released(tmp_path, replace(FLASH, compress_ratios=(0, 4, 128, 0)))  # its widths, three layers
    for ranks, loads in ((8, True), (16, False), (3, False)):
        assert diagnose(flash, "vllm", ranks).loads is loads
    texts = [check.text for check in diagnose(flash, "vllm", 16).checks if check.rule == "tensor parallel"]
    assert texts == ["o_groups 8 cannot be divided by 16"]


def test_from_the_command_line(converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    for_sglang = str(converted("--target", "sglang"))
    assert cli.run(["doctor", for_sglang, "--for", "sglang"]) == 0
    capsys.readouterr()
    assert cli.run(["doctor", for_sglang, "--for", "vllm"]) == 1
    printed = capsys.readouterr().out
    command = f"  dsv4 convert {for_sglang} NEW --target vllm"
    assert command in printed.splitlines()
    assert max(len(line) for line in printed.splitlines() if line != command) <= 80
    assert cli.run(["doctor", for_sglang, "--for", "vllm", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["loads"] is False
    wrong = {check["rule"] for check in facts["checks"] if check["status"] == "wrong"}
    assert wrong == {"expert_dtype", "expert scales"}
    assert cli.run(["doctor", for_sglang, "--for", "vllm", "-q"]) == 1
    assert capsys.readouterr() == ("", "")
    assert cli.run(["doctor", for_sglang, "--for", "ollama"]) == 2
    with pytest.raises(UsageError, match="ollama"):
        diagnose(for_sglang, "ollama")
    assert cli.run(["doctor", str(Path(for_sglang) / "nowhere"), "--for", "vllm"]) == 3


def dry_runs(diagnosis: Diagnosis, tmp_path: Path) -> list[int]:
    """Exit codes of `--dry-run` of every command that the diagnosis gives for its own folder."""
    commands = [shlex.split(check.command) for check in diagnosis.checks if check.command]
    here = [words[1:] for words in commands if words[2] == diagnosis.folder]
    return [cli.run([str(tmp_path / "new") if w == "NEW" else "1" if w == "N" else w for w in words] + ["--dry-run"])
            for words in here]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("options", "engine", "keys", "removed", "rule"), DAMAGE)
def test_the_commands_that_it_prints_do_not_refuse(
    release: Path,
    converted: Callable[..., Path],
    edited: Callable[..., Path],
    tmp_path: Path,
    options: tuple[str, ...],
    engine: str,
    keys: dict,
    removed: tuple[str, ...],
    rule: str | None,
) -> None:
    copy = edited(converted(*options) if options else release, *removed, **keys)
    for name in (engine, "reference"):
        for ranks in (None, 2, 3):
            assert set(dry_runs(diagnose(copy, name, ranks), tmp_path)) <= {0}


def test_a_folder_that_convert_refuses_is_not_the_source(
    converted: Callable[..., Path], edited: Callable[..., Path]
) -> None:
    copy = edited(converted("--target", "transformers"))
    edit_tensors(copy, {}, ("layers.0.attn.wkv.scale",))
    (check,) = [check for check in diagnose(copy, "vllm").checks if check.rule == "expert scales"]
    assert check.command == "dsv4 convert RELEASE NEW --target vllm"
    assert "'layers.0.attn.wkv.weight': F8_E4M3 weight without a block scale" in check.fix


def test_no_command_for_ranks_that_cannot_share_it(release: Path, converted: Callable[..., Path]) -> None:
    (check,) = diagnose(release, "reference", 3).checks
    assert check.command == "" and "by 3 ranks" in check.fix
    ranks = converted("--to", "same", "--layout", "mp", "--model-parallel", "2")
    assert not any(check.command for check in diagnose(ranks, "reference", 3).checks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fast_cases(2)
def test_the_quantization_of_another_tool_is_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign(tmp_path / "foreign", kind)
    for engine in ("sglang", "vllm", "transformers"):
        diagnosis = diagnose(folder, engine)
        assert failures(diagnosis) == {"quantization"} and diagnosis.loads is None
        assert not any(check.command for check in diagnosis.checks)
        (text,) = [check.text for check in diagnosis.checks if check.rule == "quantization"]
        assert kind in text
    (check,) = diagnose(folder, "reference").checks
    assert check.command == "dsv4 convert RELEASE NEW --to same --layout mp --model-parallel N"
    assert kind in check.fix

    assert cli.run(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["converted_bytes"] is None
    (problem,) = [finding["text"] for finding in facts["findings"]]
    assert kind in problem
    for options in (("--to", "fp8"), ("--to", "bf16"), ("--to", "fp4"), ("--layout", "mp", "--model-parallel", "1")):
        assert cli.run(["convert", str(folder), str(tmp_path / "new"), *options, "--dry-run"]) == 3
        assert kind in capsys.readouterr().err
    assert cli.run(["run", str(folder), "--prompt", "Hello"]) == 3
    assert kind in capsys.readouterr().err


def run_printed(diagnosis: Diagnosis, release: Path, new: Path) -> None:
    (command,) = {check.command for check in diagnosis.checks if check.command}
    program, *words = shlex.split(command.replace("RELEASE", str(release)).replace("NEW", str(new)))
    assert program == "dsv4"
    assert cli.run([*words, "-q"]) == 0


@pytest.mark.parametrize("options", [("--target", "sglang"), ("--target", "transformers"), BF16_WO_A])
@pytest.mark.fast_cases(1)
def test_the_command_it_prints_makes_it_right(
    release: Path, converted: Callable[..., Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    diagnosis = diagnose(converted(*options), "vllm")
    assert not diagnosis.loads
    run_printed(diagnosis, release, tmp_path / "new")
    assert diagnose(tmp_path / "new", "vllm").loads


def test_the_command_names_a_folder_with_spaces(release: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted("--target", "transformers"), tmp_path / "it's a copy"))
    run_printed(diagnose(folder, "vllm"), release, tmp_path / "new")
    assert diagnose(tmp_path / "new", "vllm").loads


@pytest.mark.parametrize(
    ("engine", "options", "start"),
    [
        ("vllm", (), "vllm serve {} --tensor-parallel-size 1"),
        ("sglang", (), "python -m sglang.launch_server --model-path {} --tp-size 1"),
        ("sglang", ("--target", "sglang"), "python -m sglang.launch_server --model-path {} --tp-size 1"),
        ("sglang", BF16_WO_A, "SGLANG_OPT_FP8_WO_A_GEMM=0 python -m sglang.launch_server --model-path {} --tp-size 1"),
        ("sglang", ("--to", "bf16"), "python -m sglang.launch_server --model-path {} --tp-size 1"),
        ("transformers", (), ""),
    ],
)  # fmt: skip
@pytest.mark.fast_cases(1)
def test_how_to_start_it(
    engine: str,
    options: tuple[str, ...],
    start: str,
    converted: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = converted(*options)
    assert diagnose(folder, engine, 1).start == start.format(folder)
    assert cli.run(["doctor", str(folder), "--for", engine, "--tensor-parallel", "1"]) == 0
    hint = f"start it: {start.format(folder)}" if start else f"try it here first: dsv4 run {folder} -p Hello"
    assert capsys.readouterr().err.splitlines()[-1] == hint


@pytest.mark.slow
def test_the_command_for_rank_files_makes_them(release: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
    for source, ranks in ((converted(), tmp_path / "from-fp8"), (release, tmp_path / "ranks")):
        run_printed(diagnose(source, "reference", 2), release, ranks)
        assert diagnose(ranks, "reference", 2).loads
    no_release = tmp_path / "not there"  # convert reads the rank files themselves
    run_printed(diagnose(tmp_path / "ranks", "reference", 1), no_release, tmp_path / "one")
    assert diagnose(tmp_path / "one", "reference", 1).loads
    run_printed(diagnose(tmp_path / "ranks", "sglang"), no_release, tmp_path / "folder")
    assert diagnose(tmp_path / "folder", "sglang").loads
    assert diagnose(tmp_path / "folder", "sglang").loads


# What follows loads checkpoints with the installed transformers.

Load = Callable[[Path], tuple[torch.nn.Module, torch.Tensor]]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Loads a folder with transformers, in float32 on the CPU, and runs 140 tokens through it."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import quantizer_finegrained_fp8
    from transformers.utils import logging

    # The FP8 loader asks whether accelerate is installed; decoding on the CPU uses nothing of it.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads only wait for each other at this size
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, SMALL.vocab_size, (1, 140)))

    def run(folder: Path) -> tuple[torch.nn.Module, torch.Tensor]:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info  # no missing, unexpected or mismatched tensors
        with torch.no_grad():
            return model, model.eval()(tokens).logits

    yield run
    torch.set_num_threads(threads)
    logging.enable_progress_bar()
    logging.set_verbosity_warning()


def different_weights(one: torch.nn.Module, other: torch.nn.Module) -> set[str]:
    """Names of the parameters that do not have the same values in two models."""
    values = dict(other.named_parameters())
    return {name for name, value in one.named_parameters() if not torch.equal(value, values[name])}


@pytest.mark.slow
def test_transformers_computes_the_same_from_every_form(
    release: Path, converted: Callable[..., Path], load: Load
) -> None:
    model, logits = load(converted("--to", "bf16"))
    assert logits.std() > 1
    for folder in (release, *(converted("--target", target) for target in TARGETS)):
        other, found = load(folder)
        assert different_weights(other, model) == set(), folder.name
        assert torch.equal(found, logits), folder.name


@pytest.mark.slow
def test_transformers_does_not_notice_a_missing_scale(
    release: Path, converted: Callable[..., Path], edited: Callable[..., Path], load: Load
) -> None:
    copy, shard = edited(release), "model-00002-of-00006.safetensors"
    tensors = load_file(copy / shard)
    del tensors["layers.0.attn.wkv.scale"]
    save_file(tensors, copy / shard)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    del index["weight_map"]["layers.0.attn.wkv.scale"]
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))

    wrong, right = load(copy)[0], load(converted("--to", "bf16"))[0]
    assert different_weights(wrong, right) == {"model.layers.0.self_attn.kv_proj.weight"}
    assert failures(diagnose(copy, "transformers")) == {"tensors"}


@pytest.mark.slow
def test_transformers_misplaces_the_scales_of_partial_blocks(tmp_path: Path, load: Load) -> None:
    ragged, decoded = make_checkpoint(tmp_path / "ragged", geometry=RAGGED), tmp_path / "decoded"
    assert cli.run(["convert", str(ragged), str(decoded), "--to", "bf16", "-q"]) == 0
    assert "model.layers.0.self_attn.q_a_proj.weight" in different_weights(load(ragged)[0], load(decoded)[0])
    assert failures(diagnose(ragged, "transformers")) == {"block edges"}
    assert diagnose(decoded, "transformers").loads


@pytest.mark.parametrize(("options", "wrong"), [((), set()), (("--to", "bf16"), {"n-gram tables"})])
def test_sglang_reads_v41_but_for_tables_in_bf16(options: tuple[str, ...], wrong: set[str], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "v41", geometry=V41Geometry())
    if options:
        assert cli.run(["convert", str(folder), str(tmp_path / "out"), *options, "-q"]) == 0
        folder = tmp_path / "out"
    assert failures(diagnose(folder, "sglang")) == wrong
    assert diagnose(folder, "sglang").loads is not bool(wrong)


def test_an_edition_with_another_encoder_and_its_rank_files(tmp_path: Path) -> None:
    """V4.1 has encoding/encoding.py; why some number of ranks is not possible is said in sentences."""
    made = make_checkpoint(tmp_path / "v41", geometry=V41Geometry())
    found = {check.rule: check for check in diagnose(made, "vllm").checks}
    assert found["side files"].status == "ok"
    (made / "encoding" / "encoding.py").unlink()
    found = {check.rule: check for check in diagnose(made, "vllm").checks}
    assert "missing: encoding/encoding.py" in found["side files"].text
    model = next(check for check in diagnose(made, "vllm").checks if check.rule == "architecture")
    assert model.status == "unknown" and "not run: its loader wants memory" in model.text
    (layout,) = diagnose(made, "reference", 2).checks
    assert layout.command == f"dsv4 convert {made} NEW --to same --layout mp --model-parallel 2" and not layout.fix
    (layout,) = diagnose(made, "reference", 4).checks
    assert (
        layout.fix == "layers.0.ffn has 6 experts: 4 ranks cannot share them equally. Choose another --model-parallel."
    )
