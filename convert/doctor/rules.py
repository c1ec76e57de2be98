"""Does this engine read this folder right? The rules compare the folder with the engine's row.

Untested combinations get the verdict `unknown` and exit 1. The row's `evidence` says how the others were tested.

Many rules are about faults that no engine reports: vLLM copies E8M0 expert scales byte by byte into float32, a missing
expert_dtype means fp4 to one engine and fp8 to another, and a weight without its scale is read as unscaled codes.
"""

import shlex
from collections.abc import Callable, Iterator

from dsv4.convert.checkpoint.config import (
    architecture_name,
    compress_ratios,
    config_string,
    expert_dtype,
    ignored_layers,
    quantization,
    weight_block,
)
from dsv4.convert.checkpoint.editions.table import ENCODER, edition_of
from dsv4.convert.checkpoint.foreign import HINT
from dsv4.convert.plan.engines import ABSENT, caveats_of
from dsv4.text import counted

from .context import Check, RuleContext
from .facts import Facts

LAYOUTS = {"hf": "a Hugging Face folder", "mp": "the rank files of --layout mp", "gguf": "GGUF files"}


def layout(p: RuleContext) -> Iterator[Check]:
    found, wanted = p.facts.layout, LAYOUTS[p.engine.layout]
    if found == p.engine.layout:
        yield Check("layout", "ok", wanted)
    elif found == "gguf" and p.engine.layout == "hf":
        text = f"GGUF files; that {p.name} loads this model from them was not tested"
        yield Check("layout", "unknown", text, command=f"dsv4 convert {shlex.quote(p.facts.folder)} NEW --to fp4")
    elif found == "mp":
        yield Check("layout", "refuses", f"rank files; {p.name} reads {wanted}", *p.convert)
    else:
        yield Check("layout", "refuses", f"{LAYOUTS[found]}; {p.name} reads {wanted}", *p.convert)


def _architecture(p: RuleContext) -> Iterator[Check]:
    if p.facts.layout == "mp":
        return
    model, architecture = config_string(p.facts.config, "model_type"), architecture_name(p.facts.config)
    shown = f"{architecture} ({model})"
    if p.engine.model_types and model not in p.engine.model_types:
        known = ", ".join(p.engine.model_types)
        yield Check("architecture", "refuses", f"{shown}; of this family {p.name} knows model_type {known}")
    elif architecture not in p.engine.architectures:
        why = p.engine.not_run.get(architecture or "", f"what {p.name} does with it is not known to dsv4")
        yield Check("architecture", "unknown", f"{shown}: {why}")
    else:
        yield Check("architecture", "ok", shown)
    ratios, known_ratios = compress_ratios(p.facts.config) or (), p.engine.compress_ratios
    if known_ratios and not set(ratios) <= set(known_ratios):
        *most, last = known_ratios
        listed = f"{', '.join(map(str, most))} and {last}"
        yield Check("architecture", "refuses", f"{p.name} knows compress ratios {listed} only")
    for key, value in p.engine.fixed.items():
        if (there := p.facts.dimension(key)) not in (None, value):
            yield Check("architecture", "refuses", f"{key} is {there}: {p.name} computes with {value} only")
    for key in p.engine.refused:
        if p.facts.config.get(key):
            yield Check("architecture", "refuses", f"{key} is {p.facts.config[key]}: {p.name} has no code for it")
    head_dim = p.facts.dimension("head_dim")
    if p.engine.head_dims and head_dim is not None and head_dim not in p.engine.head_dims:
        listed = " and ".join(map(str, p.engine.head_dims))
        yield Check("architecture", "refuses", f"head_dim {head_dim}: {p.name} knows {listed} only")


def _tensors(p: RuleContext) -> Iterator[Check]:
    for finding in p.facts.problems[:5]:
        yield Check("tensors", "wrong", finding.text, finding.hint)
    if len(p.facts.problems) > 5:
        yield Check("tensors", "wrong", f"{len(p.facts.problems) - 5} more such faults: dsv4 inspect lists them")
    if not p.facts.problems:
        yield Check("tensors", "ok", "names, shapes and block scales fit the config")


def _experts(p: RuleContext) -> Iterator[Check]:
    stored = sorted(p.facts.experts)
    if len(stored) > 1:
        found = f"a mixture of {', '.join(stored)}: engines look at one expert or at the config, and take all alike"
        yield Check("experts", "wrong", found, "Convert without --on-inexact keep.")
    elif stored and stored[0] not in p.engine.expert_scales:
        found = f"{stored[0]}: no checkpoint like this is known that {p.name} loads"
        yield Check("experts", "unknown", found, *p.convert)
    elif stored:
        yield Check("experts", "ok", stored[0])
    if p.facts.draft_experts:
        found = f"those of the draft blocks are {p.facts.draft_experts}: drafting from them was not tried"
        # engines that read rank files load all blocks as one model; the others load the draft blocks for drafting only
        yield Check("experts", "note" if p.engine.layout == "hf" else "unknown", found)


def _expert_dtype(p: RuleContext) -> Iterator[Check]:
    if len(p.facts.experts) != 1:
        return
    (stored,) = p.facts.experts
    declared = expert_dtype(p.facts.config)
    shown = "no expert_dtype" if declared is None else f'"expert_dtype": "{declared}"'
    allowed = p.engine.declared.get(stored)
    if allowed is None or declared in allowed:
        yield Check("expert_dtype", "ok", shown)
        return
    means = p.engine.undeclared if declared is None else declared
    edit = "Remove the key from" if allowed == (ABSENT,) else f'Write "expert_dtype": "{allowed[0]}" into'
    found = f"{shown}: {p.name} takes the experts for {means}; they are {stored}"
    # convert refuses a config that contradicts its tensors, and does not touch experts that are FP4 for an FP4 reader
    repairs = stored == "fp8" and declared in (stored, ABSENT) and p.engine.layout == "hf"
    yield Check("expert_dtype", "wrong", found, f"{edit} config.json.", p.convert.command if repairs else "")


def _expert_scales(p: RuleContext) -> Iterator[Check]:
    if len(p.facts.experts) != 1:
        return
    (stored,) = p.facts.experts
    allowed = p.engine.expert_scales.get(stored)
    found = sorted(p.facts.expert_scales)
    if allowed is None or not found:
        return
    if set(found) <= set(allowed):
        yield Check("expert scales", "ok", ", ".join(found))
    else:
        others = f"{', '.join(found)}; {p.name} reads {' or '.join(allowed)}, without an error for anything else"
        yield Check("expert scales", "wrong", others, *p.convert)


def _names_wo_a(facts: Facts) -> bool | None:
    """Whether ignored_layers names wo_a of every layer, with or without `model.`; None if it names some layers'."""
    layers, ignored = range(facts.dimension("num_hidden_layers") or 0), set(ignored_layers(facts.config))
    named = [bool(ignored & {f"{p}layers.{layer}.attn.wo_a" for p in ("", "model.")}) for layer in layers]
    return all(named) if all(named) == any(named) else None


def _wo_a(p: RuleContext) -> Iterator[Check]:
    found = ", ".join(sorted(p.facts.wo_a))
    ignores = p.engine.plain_wo_a and p.facts.wo_a == {"bf16"}
    named = not quantization(p.facts.config) or _names_wo_a(p.facts)
    if p.facts.wo_a <= set(p.engine.wo_a):
        yield Check("wo_a", "ok", found)
    elif ignores and named:
        yield Check("wo_a", "ok", f"{found}, and config.json says that it is not quantized")
    elif ignores and named is None:
        some = f"{found}; ignored_layers names it in some layers only"
        yield Check("wo_a", "unknown", some, "Name layers.N.attn.wo_a of every layer.")
    else:
        status, text = p.engine.other_wo_a
        yield Check("wo_a", status, text.format(found=found), *p.convert)


def _dense(p: RuleContext) -> Iterator[Check]:
    plain = p.facts.unquantized
    if plain and p.facts.quantized:
        count = counted(len(plain), "dense weight")
        text = f"{count} without a block scale beside others in FP8 ({plain[0]}): engines take all for FP8"
        yield Check("dense weights", "wrong", text, "Convert without --on-inexact keep.", p.decode.command)


def _tables(p: RuleContext) -> Iterator[Check]:
    if not p.facts.tables or not p.engine.tables:
        return
    found = ", ".join(sorted(p.facts.tables))
    if p.facts.tables <= set(p.engine.tables):
        yield Check("n-gram tables", "ok", found)
    else:
        text = f"{found}: {p.name} casts them into FP8 rows whose scales it never sets, without an error"
        yield Check("n-gram tables", "wrong", text, *p.convert)


def _quantization_config(p: RuleContext) -> Iterator[Check]:
    if p.facts.layout == "mp":
        return
    declared, rule = quantization(p.facts.config), "quantization_config"
    if not p.facts.quantized:
        if declared:
            fix = "Remove quantization_config (and expert_dtype) from config.json."
            found = "there, but no tensor is quantized: FP8 layers are set up for weights that have no scales"
            yield Check(rule, "wrong", found, fix)
        else:
            yield Check(rule, "ok", "none, as for plain weights")
        return
    fix = "Copy quantization_config from the release."
    if config_string(declared, "quant_method") != "fp8":
        yield Check(rule, "wrong", "does not say quant_method fp8, but there are quantized weights", fix)
    elif weight_block(p.facts.config) is None:
        yield Check(rule, "wrong", "has no weight_block_size", fix)
    elif p.engine.scale_fmts and declared.get("scale_fmt", p.engine.scale_fmts[0]) not in p.engine.scale_fmts:
        yield Check(rule, "refuses", f"scale_fmt is neither {' nor '.join(p.engine.scale_fmts)}", fix)
    else:
        rows, columns = p.facts.block
        yield Check(rule, "ok", f"fp8 in blocks of {rows} x {columns}")


def _partial_blocks(p: RuleContext) -> Iterator[Check]:
    partial = p.facts.partial_blocks
    if partial and not p.engine.partial_blocks:
        found = f"{len(partial)} FP8 weights are not whole blocks ({partial[0]}): it misplaces their scales"
        yield Check("block edges", "wrong", found, *p.decode)


def _ignored(p: RuleContext) -> Iterator[Check]:
    for note in p.facts.notes:
        yield Check("shards", "note", note)


def _side_files(p: RuleContext) -> Iterator[Check]:
    for name, kind in p.facts.misnamed.items():
        yield Check("side files", "refuses", f"{name}: {kind.words}", kind.hint)
    absent = [name for name in p.engine.needs if name not in p.facts.files]
    encoder = edition_of(p.facts.config).encoder
    wanted = [encoder if name == ENCODER else name for name in p.engine.wants]
    missed = [name for name in wanted if name not in p.facts.files]
    if absent:
        yield Check("side files", "refuses", f"missing: {', '.join(absent)}", "Copy them from the release.")
    if missed:
        yield Check("side files", "note", f"missing: {', '.join(missed)}", "Copy them from the release.")
    if not (absent or missed or p.facts.misnamed):
        yield Check("side files", "ok", "all there")


def _product(p: RuleContext, keys: tuple[str, ...]) -> int | None:
    total = 1
    for key in keys:
        value = p.facts.dimension(key)
        if value is None:
            return None
        total *= value
    return total


def _split_faults(p: RuleContext, ranks: int) -> Iterator[str]:
    """Why the engine cannot split the tensors over this number of ranks."""
    for key in p.engine.divided:
        value = p.facts.dimension(key)
        if value is not None and value % ranks:
            yield f"{key} {value} cannot be divided by {ranks}"
    rows = p.facts.block[0]
    for split in p.engine.splits if p.facts.quantized else ():
        width = _product(p, split.keys)
        concerns = not split.experts or p.facts.experts == {split.experts}
        if concerns and width is not None and (width % ranks or width // ranks % rows):
            yield f"{' x '.join(split.keys)} = {width} over {ranks} ranks is no multiple of {rows}"


def _tensor_parallel(p: RuleContext) -> Iterator[Check]:
    ranks, rule = p.tensor_parallel, "tensor parallel"
    if ranks is None:
        return
    faults = list(_split_faults(p, ranks))
    for fault in faults:
        yield Check(rule, "refuses", fault, "Use fewer ranks.")
    if p.facts.layout == "mp" and p.facts.ranks != ranks:
        advice = ("", "") if faults else p.convert
        yield Check(rule, "refuses", f"the files are for {p.facts.ranks} ranks, not {ranks}", *advice)
    elif not faults:
        yield Check(rule, "ok", f"{ranks} ranks")


def _caveats(p: RuleContext) -> Iterator[Check]:
    for caveat in caveats_of(p.name, p.facts.stored):
        yield Check(caveat.rule, "note", caveat.text)


def _foreign(p: RuleContext) -> Iterator[Check]:
    yield Check("quantization", "unknown", str(p.facts.foreign), HINT)


def _form(p: RuleContext) -> Iterator[Check]:
    if p.facts.form in p.engine.forms:
        formats = ", ".join(sorted(p.facts.experts))
        yield Check("form", "ok", f"experts {formats}; {p.name} loads each type that dsv4 reads")
        return
    text = f"{p.facts.form}, in which dsv4 reads every value; that {p.name} loads it was not tested"
    command = f"dsv4 convert {shlex.quote(p.facts.folder)} NEW --to fp4"
    yield Check("form", "unknown", text, "The release's own form is what its rules are about.", command)


Rule = Callable[[RuleContext], Iterator[Check]]

RULES: tuple[Rule, ...] = (
    _architecture, _tensors, _experts, _expert_dtype, _expert_scales, _wo_a, _dense, _tables, _quantization_config,
    _partial_blocks, _ignored, _side_files, _tensor_parallel, _caveats,
)  # fmt: skip
RULES_FOR_FOREIGN: tuple[Rule, ...] = (_architecture, _foreign, _side_files)
RULES_FOR_FORMS: tuple[Rule, ...] = (_architecture, _tensors, _form, _side_files, _caveats)
