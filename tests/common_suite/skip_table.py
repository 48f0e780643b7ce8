"""Prints a table of every common test that is skipped, with its reason, from a run's JUnit file.

pytest tests/common_suite --junitxml=run.xml; python tests/common_suite/skip_table.py run.xml > docs/common_suite.md
"""

import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict


def main(path: str) -> None:
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    reasons = defaultdict(list)
    for case in cases:
        skipped = case.find("skipped")
        if skipped is not None:
            owner = case.get("classname").rpartition(".")[2]
            reasons[skipped.get("message")].append(f"{owner}.{case.get('name')}")
    total = sum(map(len, reasons.values()))
    print("# transformers' own common tests on our classes\n")
    print(f"{len(cases) - total} run and pass, {total} are skipped. Made by `tests/common_suite/skip_table.py`.\n")
    print(
        "Most skips are the suite's own: a modality, backend or device that does not exist here. Ours are the reasons"
    )
    print("in `tests/common_suite/skips.py`.\n")
    print("| reason | tests |\n|---|---|")
    for reason, tests in sorted(reasons.items(), key=lambda item: -len(item[1])):
        names = ", ".join(f"`{test}`" for test in sorted(tests))
        reason = reason.replace("|", "\\|")
        print(f"| {reason} | {names} |")


if __name__ == "__main__":
    main(sys.argv[1])
