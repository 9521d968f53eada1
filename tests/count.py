"""Sum pytest's junit reports: how many tests passed, failed and were skipped, why each was skipped, and which took
longest, the making of what they share included."""

import argparse
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path


def reason(skipped: ElementTree.Element) -> str:
    # Where a whole file was skipped, pytest keeps the reason in the text only: ('file', line, 'Skipped: the reason').
    whole_file = re.search(r"Skipped: (.*)['\"]\)", skipped.text or "")
    return whole_file.group(1) if whole_file else skipped.get("message", "no reason given")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="*", type=Path)
    parser.add_argument("--slowest", type=int, default=0, metavar="N", help="name the N tests that took longest")
    options = parser.parse_args(arguments)
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    seconds: list[tuple[float, str]] = []
    for report in options.reports:
        if not report.exists():
            print(f"{report.stem}: no report, it did not run to its end")
            outcomes["failed"] += 1
            continue
        for case in ElementTree.parse(report).iter("testcase"):
            seconds.append((float(case.get("time", 0)), f"{report.stem} {case.get('classname')}::{case.get('name')}"))
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
    for duration, name in sorted(seconds, reverse=True)[: options.slowest]:
        print(f"{duration:6.1f} s {name}")
    print(", ".join(f"{outcomes[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")))
    return 1 if outcomes["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
