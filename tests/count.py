"""Sum pytest's junit reports: how many tests passed, failed and were skipped, and why each was skipped."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path


def reason(skipped: ElementTree.Element) -> str:
    # Where a whole file was skipped, pytest keeps the reason in the text only: ('file', line, 'Skipped: the reason').
    whole_file = re.search(r"Skipped: (.*)['\"]\)", skipped.text or "")
    return whole_file.group(1) if whole_file else skipped.get("message", "no reason given")


def main(reports: list[Path]) -> int:
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for report in reports:
        if not report.exists():
            print(f"{report.stem}: no report, it did not run to its end")
            outcomes["failed"] += 1
            continue
        for case in ElementTree.parse(report).iter("testcase"):
            skipped = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                outcomes["failed"] += 1
            elif skipped is not None:
                outcomes["skipped"] += 1
                reasons[reason(skipped)] += 1
            else:
                outcomes["passed"] += 1
    for why, count in reasons.most_common():
        print(f"{count:6} skipped: {why}")
    print(", ".join(f"{outcomes[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")))
    return 1 if outcomes["failed"] else 0


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]]))
