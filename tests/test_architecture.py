"""Limits on the size of a function in src/sepo: 60 lines, 8 parameters."""

import ast
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src" / "sepo"
LINES, PARAMETERS = 60, 8
# Functions with more parameters.
KERNELS = "a Triton kernel: it takes each pointer and stride of its tensors by itself"
PUBLIC = "public: each parameter is documented, and callers name them"
WIDE = {
    "evaluate/generate.py::generate_responses": PUBLIC,
    "forward/attention.py::packed_attention_forward": "the signature is that of an attention function of Transformers",
    "kernels/layers_cuda.py::_norm_backward": KERNELS,
    "kernels/layers_cuda.py::_rotate": KERNELS,
    "kernels/layers_cuda.py::_gated_backward": KERNELS,
    "kernels/lm_head_cuda.py::_forward": KERNELS,
    "kernels/lm_head_cuda.py::_backward": KERNELS,
    "kernels/lm_head_cuda.py::block_backward": "launches the kernel of the same parameters",
    "models/weights.py::load_model": PUBLIC,
    "report/build.py::build_report": PUBLIC,
    "rewards/function.py::token_rewards": PUBLIC,
    "rewards/signals.py::RewardFunction.__init__": PUBLIC,
    "training/fit.py::train_model": PUBLIC,
    "training/trainer.py::PreferenceTrainer.__init__": "the parameters of `transformers.Trainer`, and four more",
}


def functions(node, name=""):
    """Every function below a node, with its name within the file."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{name}.{child.name}" if name else child.name
            if not isinstance(child, ast.ClassDef):
                yield inner, child
            yield from functions(child, inner)
        elif isinstance(child, ast.stmt):
            yield from functions(child, name)


def parameters(function):
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + sum(map(bool, (given.vararg, given.kwarg)))


def test_no_function_is_long_and_few_are_wide():
    long, wide = {}, {}
    for file in sorted(SOURCES.rglob("*.py")):
        for name, function in functions(ast.parse(file.read_text("utf-8"))):
            place = f"{file.relative_to(SOURCES).as_posix()}::{name}"
            if (lines := function.end_lineno - function.lineno + 1) > LINES:
                long[place] = lines
            if (number := parameters(function)) > PARAMETERS:
                wide[place] = number
    assert not long, f"functions of more than {LINES} lines: split them by what they do"
    assert wide.keys() - WIDE.keys() == set(), (
        f"more than {PARAMETERS} parameters: pass an object, or give a reason here"
    )
    assert WIDE.keys() <= wide.keys(), "no longer wide: drop the exception"
