"""Print the test functions that take over 0.25 s, all parameters together, for tests/slow.txt.

    python scripts/slow_tests.py build/tests.xml > tests/slow.txt

`make check` leaves these out (tests/conftest.py).
"""

import sys
from collections import Counter
from xml.etree import ElementTree

SECONDS = 0.25


def main(report: str) -> None:
    times: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        # tests.data.test_data.TestRealData, test_name[parameters] -> data/test_data::test_name
        parts = [part for part in case.get("classname", "").split(".")[1:] if not part.startswith("Test")]
        times["/".join(parts) + "::" + case.get("name", "").split("[")[0]] += float(case.get("time", 0))
    print("\n".join(sorted(name for name, seconds in times.items() if seconds >= SECONDS)))


if __name__ == "__main__":
    main(sys.argv[1])
