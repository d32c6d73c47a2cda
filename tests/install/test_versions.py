"""The table of versions, from reports that were written for the test."""

from __future__ import annotations

from tests.install import versions

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="other"/>
<testcase classname="tests.a" name="bad"><failure message="x"/></testcase>
<testcase classname="tests.b" name="setup"><error message="x"/></testcase>
<testcase classname="tests.b" name="gone"><skipped message="x"/></testcase>
</testsuite></testsuites>"""


def test_report_is_counted(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    found = versions.read_report(tmp_path / "report.xml")
    assert found == versions.Outcome(2, 1, ["tests.a::bad", "tests.b::setup"])


def test_a_run_without_a_report_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(versions.subprocess, "run", lambda *_, **__: None)
    assert versions.run_suite(tmp_path / "python", tmp_path / "report.xml", []).failed


def test_rows_of_other_sets_and_notes_stay(tmp_path):
    table = tmp_path / "versions.md"
    numbers = {"Python": "3.11.7"} | dict.fromkeys(versions.SHOWN, "1.0")

    def row(name, passed):
        return versions.row_of(name, numbers, versions.Outcome(passed, 1, []), "2026-11-26")

    versions.update_table({name: row(name, 10) for name in versions.SETS}, table)
    table.write_text(table.read_text() + "\nA note.\n")
    before = table.read_text()
    versions.update_table({"pinned": row("pinned", 20)}, table)
    after = table.read_text()
    assert after == before.replace(row("pinned", 10), row("pinned", 20))
    titles = next(line for line in after.splitlines() if line.startswith("| set"))
    assert titles.count("|") == row("oldest", 10).count("|")
    assert after.endswith("\nA note.\n")
