"""Every model family with an experts interface, by plain Inductor and by moe_compile.

    python benchmarks/families.py                   # all, hours on 2 cores; docs/families.md
    python benchmarks/families.py --steps matches   # without compiling: minutes
    python benchmarks/families.py --families mixtral gpt_oss --form batched_mm

For each family a small model with random weights runs in float32 three times, uncompiled, compiled
by Inductor and compiled by moe_compile (both `fullgraph=True`), and in float64 by the model's own
loop over experts, which is the truth the others are held against. Matches are counted in float32
and in bfloat16. Results are kept under --cache and made anew where a source of moe_compile, torch
or transformers has changed, so that an interrupted sweep goes on where it was.
"""

import argparse
import datetime
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder, whose families.py is not the one of the tests

import torch  # noqa: E402
import transformers  # noqa: E402
from tqdm import tqdm  # noqa: E402

import moe_compile  # noqa: E402
from moe_compile.passes import PASSES  # noqa: E402
from moe_compile.pipeline import source_hash  # noqa: E402
from tests import families as small  # noqa: E402

ALL = tuple(p.__name__ for p in PASSES)
COLUMNS = ("find_routing", "find_activation")
SHAPES = ((2, 7), (3, 9), (4, 5))  # the first is compared; all of them count compiles
CACHE = Path.home() / ".cache" / "moe_compile" / "families"
SHORT = {"grouped_mm": "grouped", "batched_mm": "batched"}


def main() -> None:
    args = parse_args()
    if args.worker:
        work(args)
        return
    names = args.families or small.families()
    todo = [(name, form) for form in args.form for name in names]
    bar = tqdm(todo, unit="model")
    for name, form in bar:
        bar.set_postfix_str(f"{name} {SHORT[form]}")
        missing = missing_steps(args, name, load(args.cache, name, form))
        if missing:
            run_worker(args, name, form, missing)
    if args.out:
        results = {n: {f: load(args.cache, n, f) for f in small.FORMS} for n in small.families()}
        args.out.write_text(document(results))
        print(f"{args.out} written")
    failed = [f"{n} {SHORT[f]}: {load(args.cache, n, f).get('error', '')}" for n, f in todo]
    print("\n".join(line for line in failed if not line.endswith(": ")) or "no errors")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--families", nargs="*", default=[], help="some only")
    parser.add_argument("--form", nargs="*", default=list(small.FORMS), choices=small.FORMS)
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--keep", action="store_true", help="use results of older sources, too")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "families.md")
    parser.add_argument("--no-out", dest="out", action="store_const", const=None)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one model")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def path_of(cache: Path, name: str, form: str) -> Path:
    return cache / f"{name}.{form}.json"


def load(cache: Path, name: str, form: str) -> dict[str, Any]:
    path = path_of(cache, name, form)
    return json.loads(path.read_text()) if path.exists() else {}


def state(name: str) -> dict[str, str]:
    """What a result depends on."""
    config = repr((small.COMMON, small.KNOWN.get(name))).encode()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sources": source_hash(Path(moe_compile.__file__).parent)[:12],
        "config": hashlib.sha256(config).hexdigest()[:12],
    }


def missing_steps(args: argparse.Namespace, name: str, result: dict[str, Any]) -> list[str]:
    if "error" in result and (args.keep or result["state"] == state(name)):
        return []
    done = result.get("done", []) if args.keep or result.get("state") == state(name) else []
    return [step for step in args.steps if step not in done]


def run_worker(args: argparse.Namespace, name: str, form: str, steps: list[str]) -> None:
    """One model in a process of its own, which may crash or hang without ending the sweep."""
    path = path_of(args.cache, name, form)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = load(args.cache, name, form)
    if not args.keep and result.get("state") != state(name):
        path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--worker", "--families", name, "--form", form]
    command += ["--cache", str(args.cache), "--steps", *steps]
    # Inductor's cache of its own, too: a worker that is killed may leave half a library in it.
    with tempfile.TemporaryDirectory() as folder:
        own = {"TRANSFORMERS_VERBOSITY": "error", "TORCHINDUCTOR_CACHE_DIR": folder}
        environment = {**os.environ, **own}
        try:
            done = subprocess.run(
                command, timeout=args.timeout, env=environment, capture_output=True, text=True
            )
            end = f"exit {done.returncode}: {done.stderr.strip()[-300:]}"
        except subprocess.TimeoutExpired:
            end = f"more than {args.timeout} s"
    result = load(args.cache, name, form)
    if "error" not in result and set(steps) - set(result.get("done", [])):
        save(args.cache, name, form, {**result, "state": state(name), "error": end})


def work(args: argparse.Namespace) -> None:
    """Write what one model gives, after each step."""
    (name,), (form,) = args.families, args.form
    warnings.simplefilter("ignore")
    logging.getLogger("moe_compile").setLevel(logging.ERROR)  # declines are in the table
    result = {**load(args.cache, name, form), "state": state(name)}
    try:
        for step in args.steps:
            STEPS[step](name, form, result)
            result["done"] = sorted({*result.get("done", []), step})
            save(args.cache, name, form, result)
    except Exception as error:
        result["error"] = in_one_line(error)
        result["traceback"] = traceback.format_exc()
        save(args.cache, name, form, result)


def save(cache: Path, name: str, form: str, result: dict[str, Any]) -> None:
    path_of(cache, name, form).write_text(json.dumps(result, indent=1))


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:500]}".splitlines()[0]


def ready(name: str, form: str, dtype: torch.dtype) -> Any:
    model: Any = small.build(name, dtype)
    model.set_experts_implementation(form)
    return model


def count_matches(name: str, form: str, result: dict[str, Any]) -> None:
    """Rewrites of each pass, and how many expert layers ran."""
    result["class"] = small.model_class(name).__name__
    result["counts"], result["declined"] = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = ready(name, form, dtype)
        inputs = small.inputs()
        with torch.no_grad(), small.counting_calls(small.expert_layers(model)) as called:
            model(**inputs)
        result["layers"] = len(called)
        report = moe_compile.explain(model, **inputs)
        word = str(dtype).removeprefix("torch.")
        result["counts"][word] = report.counts
        result["breaks"] = list(report.breaks)
        reasons = Counter(
            f"{p.name}: {event.detail}"
            for graph in report.graphs
            for p in graph.passes
            for event in p.outcome.declined
        )
        result["declined"][word] = dict(reasons)


def compare(name: str, form: str, result: dict[str, Any]) -> None:
    """Errors against float64, uncompiled and by both compilers."""
    inputs = small.inputs()
    model = ready(name, form, torch.float32)
    exact = small.exact_logits(name, model, **inputs)
    logits = {"eager": small.run(model, **inputs)}
    result["stock_error"] = ""
    try:
        logits["inductor"] = compiled(model, "inductor", True, **inputs)
    except Exception as error:  # the model's own fault: then both compile what they can
        result["stock_error"] = in_one_line(error)
        logits["inductor"] = compiled(model, "inductor", False, **inputs)
    logits["moe_compile"] = compiled(model, "moe_compile", not result["stock_error"], **inputs)
    result["errors"] = {word: small.errors(got, exact) for word, got in logits.items()}
    result["size"] = small.errors(exact, torch.zeros_like(exact))
    tokens = {word: got.argmax(-1) for word, got in logits.items()}
    result["argmax"] = all(torch.equal(t, exact.argmax(-1)) for t in tokens.values())
    result["within"] = small.within(
        result["errors"]["moe_compile"], result["errors"]["inductor"], result["size"]
    )


def compiled(model: Any, backend: str, fullgraph: bool, **inputs: Any) -> torch.Tensor:
    torch._dynamo.reset()
    return small.run(torch.compile(model, backend=backend, fullgraph=fullgraph), **inputs)


def count_compiles(name: str, form: str, result: dict[str, Any]) -> None:
    """Graphs over several shapes, as far as the passes: theirs against none."""
    result["compiles"] = {}
    for word, disable in (("inductor", ALL), ("moe_compile", ())):
        torch._dynamo.reset()
        model = ready(name, form, torch.float32)
        graphs: list[Any] = []
        look = lambda gm, graph: graphs.append(graph)  # noqa: B023, E731
        model = torch.compile(model, backend=small.until_passes(look, disable))
        for shape in SHAPES:
            small.run(model, **small.inputs(*shape))
        result["compiles"][word] = len(graphs)


STEPS = {"matches": count_matches, "numbers": compare, "compiles": count_compiles}

HEAD = """\
# Model families

<!-- Generated by benchmarks/families.py: change that, not this. -->

{date}, torch {torch}, transformers {transformers}, CPU, sources {sources}. Made by

    python benchmarks/families.py

Every folder of `transformers.models` with a class that `use_experts_implementation` decorates, made
small (`tests/families.py`), with random weights.

- *Experts*, *routers*, *activations*: layers rewritten, of all; in float32, and in bfloat16 where
  that differs. Grouped and batched are transformers' two forms (`set_experts_implementation`).
- *Tokens*: is the largest logit the same everywhere, uncompiled, by Inductor, by moe_compile (both
  `fullgraph=True`), and in float64?
- *Error*: the largest and the RMS error of moe_compile's float32 logits against float64, as
  multiples of Inductor's. Up to 2, plus one unit in the last place, is within the rule.
- *Compiles*: graphs for three shapes of input, with the passes and without.

All experts matched, tokens the same and errors within the rule, in both forms: **{good} of {all}**
families.

| family | class | experts grouped | batched | routers | activations | tokens \
| error grouped | batched | compiles | remarks |
|---|---|--:|--:|--:|--:|---|--:|--:|--:|---|"""


def document(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """docs/families.md."""
    good = [n for n, r in results.items() if all(is_good(r[f]) for f in small.FORMS)]
    versions = {n: {versions_of(f) for f in r.values() if f} for n, r in results.items()}
    most = Counter(v for vs in versions.values() for v in vs).most_common(1)[0][0]
    other = [n for n, vs in sorted(versions.items()) if vs - {most}]
    torch_, transformers_, sources = most
    head = HEAD.format(
        date=datetime.date.today(),
        good=len(good),
        all=len(results),
        torch=torch_,
        transformers=transformers_,
        sources=sources,
    )
    lines = [head]
    lines += [row(name, results[name]) for name in sorted(results)]
    if other:
        lines += ["", f"Rows of other sources or versions than the rest: {', '.join(other)}."]
    return "\n".join([*lines, ""])


def versions_of(result: dict[str, Any]) -> tuple[str, str, str]:
    state = result["state"]
    return state["torch"], state["transformers"], state["sources"]


def row(name: str, forms: dict[str, dict[str, Any]]) -> str:
    grouped, batched = (forms[f] for f in small.FORMS)
    some = grouped or batched
    cells = [name, f"`{some['class']}`" if "class" in some else ""]
    cells += [matched(f, "find_experts") for f in (grouped, batched)]
    cells += [both(forms, lambda f, p=p: matched(f, p)) for p in COLUMNS]
    cells += [both(forms, tokens)]
    cells += [ratio(f) for f in (grouped, batched)]
    cells += [both(forms, compiles), "; ".join(remarks(name, forms))]
    return f"| {' | '.join(cells)} |"


def both(forms: dict[str, dict[str, Any]], cell: Any) -> str:
    """One text where both forms give the same."""
    texts = [cell(forms[f]) for f in small.FORMS]
    return texts[0] if texts[0] == texts[1] else " / ".join(t or "-" for t in texts)


def matched(result: dict[str, Any], pass_name: str) -> str:
    if "bfloat16" not in result.get("counts", {}):
        return ""
    single, half = (result["counts"][d].get(pass_name, 0) for d in ("float32", "bfloat16"))
    text = f"{single}/{result['layers']}"
    return text if half == single else f"{text} (bf16 {half}/{result['layers']})"


def tokens(result: dict[str, Any]) -> str:
    return {True: "same", False: "DIFFER", None: ""}[result.get("argmax")]


def ratio(result: dict[str, Any]) -> str:
    if "within" not in result:
        return ""
    errors = result["errors"]
    quotients = [
        ours / theirs if theirs else float(ours > 0)
        for ours, theirs in zip(errors["moe_compile"], errors["inductor"], strict=True)
    ]
    text = " ".join(f"{q:.2f}" for q in quotients)
    return text if result["within"] else f"{text} OUTSIDE"


def compiles(result: dict[str, Any]) -> str:
    counts = result.get("compiles", {})
    return f"{counts['moe_compile']}/{counts['inductor']}" if len(counts) == 2 else ""


def remarks(name: str, forms: dict[str, dict[str, Any]]) -> list[str]:
    """Why something is missing, in few words."""
    known = small.KNOWN.get(name, small.Family())
    texts = [known.reason] if known.reason else []
    for form, result in forms.items():
        word = SHORT[form]
        declined = result.get("declined", {})
        only = set(declined.get("bfloat16", ())) - set(declined.get("float32", ()))
        texts += [f"bf16: {reason}" for reason in sorted(only) if reason.startswith("find_")]
        if not result:
            texts.append(f"{word}: not run")
        if result.get("breaks"):
            texts.append(f"{word}: graph breaks, {result['breaks'][0]}")
        if result.get("stock_error"):
            texts.append(
                f"{word}: Inductor with fullgraph=True raises {clip(result['stock_error'])}"
            )
        if "error" in result:
            what = "no small config" if "counts" not in result else word
            texts.append(f"{what}: {clip(result['error'])}")
    return list(dict.fromkeys(texts))


def clip(text: str, most: int = 160) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= most else f"{text[:most]}..."


def is_good(result: dict[str, Any]) -> bool:
    """All experts matched, tokens equal, errors within the rule."""
    if "error" in result or "within" not in result:
        return False
    counts = [result["counts"][d].get("find_experts", 0) for d in ("float32", "bfloat16")]
    return counts == [result["layers"]] * 2 and result["argmax"] and result["within"]


if __name__ == "__main__":
    main()
