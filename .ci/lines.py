"""Print how much source there is: lines, the largest file, the longest function."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("moe_compile", "ops", "passes", "tests", "benchmarks", "examples")


def main() -> None:
    total = 0
    for folder in FOLDERS:
        files = {path: path.read_text() for path in sorted((ROOT / folder).glob("*.py"))}
        if not files:
            continue
        lengths = {path: text.count("\n") for path, text in files.items()}
        largest = max(lengths, key=lengths.__getitem__)
        functions = [
            (node.end_lineno - node.lineno + 1, f"{path.name}:{node.name}")
            for path, text in files.items()
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
        ]
        longest = max(functions, default=(0, "-"))
        total += sum(lengths.values())
        print(
            f"{folder:12} {len(files):3} files {sum(lengths.values()):6} lines; "
            f"largest file {largest.name} {lengths[largest]}; "
            f"longest function {longest[1]} {longest[0]}"
        )
    print(f"{'together':12} {total:17} lines")


if __name__ == "__main__":
    main()
