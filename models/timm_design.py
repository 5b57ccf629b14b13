"""timm's weights as ours: its description of a model is read, held against our design, and every difference named.

The description is config.json beside the weights, as timm's hub functions write it: `architecture`, `model_args` that
change it, `pretrained_cfg` with the preprocessing. What an architecture is, timm's own tables say, so that the package
timm is needed here and nowhere else; nothing is fetched.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import InputError, unknown
from models import card as cards
from models import interop, timm_names
from models.card import Card, Preprocessing
from models.compare import differences
from models.design import RelativeBias, Spec, Stage, Stride
from models.interop import Weights
from models.spec import SPECS
from models.weight_file import check_finite, located, read_json, read_safetensors

CONFIG = "config.json"

# What our networks have in timm's words. Other fields are free, or have no part in blocks of types C and T.
OURS: dict[str, Any] = {
    "stem_bias": True,
    "conv_block_type": "mbconv",
    "conv_expand_output": True,
    "conv_kernel_size": 3,
    "conv_group_size": 1,
    "conv_pre_norm_act": False,
    "conv_output_bias": True,
    "conv_pool_type": "max2",
    "conv_padding": "",
    "conv_attn_early": False,
    "conv_attn_layer": "se",
    "conv_attn_act_layer": "silu",
    "conv_act_layer": "gelu_tanh",
    "conv_norm_layer": "batchnorm2d",
    "conv_norm_eps": 1e-3,
    "transformer_head_first": True,
    "transformer_expand_first": True,
    "transformer_shortcut_bias": True,
    "transformer_attn_bias": True,
    "transformer_pool_type": "max2",
    "transformer_init_values": None,
    "transformer_act_layer": "gelu_tanh",
    "transformer_norm_layer": "layernorm2d",
    "transformer_norm_eps": 1e-5,
}
STRIDES: dict[str, Stride] = {"1x1": "expansion", "dw": "depthwise"}
TABLES: dict[str | None, RelativeBias] = {"bias": "pre", "none": "none", "": "none", None: "none"}
# Arguments of timm's models that are not of the design, or are read elsewhere.
APART = ("img_size", "in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate")


def read_any(path: Path) -> Weights:
    """The weights in a file of ours, or in timm's folder or file with config.json beside it; all values finite.

    Raises:
        InputError: see `interop.read` and `read_timm`.
    """
    file = located(path)
    header, _ = read_safetensors(file)
    weights = interop.read(file) if interop.HEADER in header else read_timm(file)
    check_finite(weights.tensors, str(file))
    return weights


def read_timm(file: Path) -> Weights:
    """timm's weights in a safetensors file with its config.json beside it, under our names.

    Raises:
        InputError: no config.json, the package timm is missing, a design that is not ours with every difference, or a
            tensor that does not fit.
    """
    config = file.with_name(CONFIG)
    if not config.is_file():
        raise InputError(
            f"{file}: has no model card and no {CONFIG} beside it, so nothing tells which network it holds. timm "
            f"writes both: timm.models.save_for_hf(model, folder)"
        )
    document = read_json(config)
    try:
        given = dict(document.get("model_args") or {})
        spec = spec_of(str(document.get("architecture")), given, str(config))
        card = _card(spec, document, given, str(config))
        wanted = interop.shapes(card)
    except InputError:
        raise
    except (
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
    ) as error:  # values of types that timm never writes
        raise InputError(f"{config}: describes no model: {type(error).__name__}: {error}") from None
    _, tensors = read_safetensors(file)
    return Weights(card, timm_names.from_timm(tensors, spec, wanted, str(file)))


def spec_of(architecture: str, model_args: dict[str, Any], where: str) -> Spec:
    """The spec of a timm architecture with changed arguments.

    Raises:
        InputError: naming `where` and everything in which it is not ours; or no CoAtNet of timm's at all.
    """
    try:
        from timm.models import maxxvit
    except ImportError:
        raise InputError(
            f"{where}: timm's own tables say what {architecture!r} is, and timm is not installed: pip install -e "
            f"'.[timm]'"
        ) from None
    tables = maxxvit.model_cfgs
    bases = {name: base for name in dir(maxxvit) for base in (name.rpartition("_")[0], name) if base in tables}
    plain = architecture.partition(".")[0]
    if plain not in bases:
        raise unknown(f"timm CoAtNet in {where}", architecture, [name for name in bases if name.startswith("coatnet")])
    found = _overlaid(tables[bases[plain]], model_args, where)
    wrong = [
        f"{name} is {found[name]!r} there, ours is {ours!r}" for name, ours in OURS.items() if found.get(name) != ours
    ]
    wrong += _odd_shape(found)
    if wrong:
        raise InputError(
            f"{where}: {architecture} is not this project's CoAtNet (arXiv 2106.04803): "
            f"{'; '.join(wrong)}. Such weights would compute another function and are not taken"
        )
    return _spec(plain, found)


def _overlaid(config: Any, model_args: dict[str, Any], where: str) -> dict[str, Any]:
    """All fields of timm's configuration, flat, with prefixes conv_ and transformer_, and the changes in place."""
    flat = {name: value for name, value in vars(config).items() if name not in ("conv_cfg", "transformer_cfg")}
    for prefix, part in (("conv_", config.conv_cfg), ("transformer_", config.transformer_cfg)):
        flat |= {prefix + name: value for name, value in vars(part).items()}
    for name in model_args:
        if name not in flat and name not in APART:
            raise unknown(f"argument of timm's model in {where}:", name, [*flat, *APART])
    return flat | {name: value for name, value in model_args.items() if name not in APART}


def _odd_shape(found: dict[str, Any]) -> list[str]:
    """Differences that are no single value: stages, widths and ratios that no spec of ours has."""
    wrong = []
    width = found["stem_width"]
    if not isinstance(width, int) and len(set(width)) != 1:
        wrong.append(f"stem_width is {tuple(width)} there, ours has one width")
    if not all(kind in ("C", "T") for kind in found["block_type"]):
        wrong.append(f"block_type is {tuple(found['block_type'])} there, ours has C or T for a whole stage")
    if found["head_hidden_size"] != found["embed_dim"][-1]:
        wrong.append(f"head_hidden_size is {found['head_hidden_size']} there, ours is {found['embed_dim'][-1]}")
    if found["conv_stride_mode"] not in STRIDES:
        wrong.append(f"conv_stride_mode is {found['conv_stride_mode']!r} there, ours is '1x1' or 'dw'")
    if found["transformer_rel_pos_type"] not in TABLES:
        wrong.append(f"transformer_rel_pos_type is {found['transformer_rel_pos_type']!r} there, ours is 'bias'")
    ratios = found["conv_expand_ratio"], found["transformer_expand_ratio"]
    if ratios[0] != ratios[1] or int(ratios[0]) != ratios[0]:
        wrong.append(f"expand ratios are {ratios[0]} and {ratios[1]} there, ours is one whole number")
    return wrong


def _spec(name: str, found: dict[str, Any]) -> Spec:
    """Our spec of a configuration that differs from ours in nothing; called by our name where it is that network."""
    stem = found["stem_width"] if isinstance(found["stem_width"], int) else found["stem_width"][0]
    stages = [Stage("s0", "stem", 2, stem)]
    sizes = zip(found["block_type"], found["depths"], found["embed_dim"], strict=True)
    for number, (kind, depth, width) in enumerate(sizes, 1):
        stages.append(Stage(f"s{number}", "mbconv" if kind == "C" else "transformer", depth, width))
    spec = Spec(
        name, tuple(stages), found["transformer_dim_head"], int(found["conv_expand_ratio"]), found["conv_attn_ratio"],
        stride=STRIDES[found["conv_stride_mode"]], relative_bias=TABLES[found["transformer_rel_pos_type"]],
    )  # fmt: skip
    for stride in (spec.stride, *STRIDES.values()):  # first a namesake with this placement of the stride
        for known in SPECS.values():
            if not differences(known, replace(spec, stride=stride)):
                return replace(spec, name=known.name, kernel_std=known.kernel_std)
    return spec


def _card(spec: Spec, document: dict[str, Any], model_args: dict[str, Any], where: str) -> Card:
    """The card of timm's weights, as far as config.json tells.

    Raises:
        InputError: a value that no network or preprocessing of ours has.
    """
    described = document.get("pretrained_cfg", document)
    pixels = model_args.get("img_size") or described.get("input_size", (3, 224, 224))[1:]
    labels = document.get("label_names", described.get("label_names")) or ()
    classes = model_args.get("num_classes", document.get("num_classes", described.get("num_classes", 1000)))
    wrong = [
        f"{name} is {value!r}, must be {ours!r}"
        for name, value, ours in (
            ("in_chans", model_args.get("in_chans", 3), 3),
            ("global_pool", model_args.get("global_pool", document.get("global_pool", "avg")), "avg"),
        )
        if value != ours
    ]
    if wrong:
        raise InputError(f"{where}: {'; '.join(wrong)}")
    seen = {
        "mean": described.get("mean", Preprocessing.mean),
        "std": described.get("std", Preprocessing.std),
        "crop": "squash" if described.get("crop_mode") == "squash" else "center",
        "eval_crop": described.get("crop_pct", Preprocessing.eval_crop),
        "interpolation": described.get("interpolation", Preprocessing.interpolation),
    }
    card = Card(
        spec,
        (pixels, pixels) if isinstance(pixels, int) else (int(pixels[0]), int(pixels[1])),
        int(classes),
        tuple(labels),
        recipe=f"timm {document.get('architecture')}",
        preprocessing=cards.preprocessing(seen),
        license=str(described.get("license") or ""),
    )
    cards.check(card)
    return card
