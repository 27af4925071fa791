"""docs/troubleshooting.md quotes what the program prints, and is short enough to be searched."""

import re

from tests.docs.markdown import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def printed() -> str:
    """The package's source, with strings that are cut into lines joined, and values as one sign."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("olvae/**/*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", text)
    return re.sub(r"\{[^{}\n]*\}", "…", joined)


def test_messages_of_the_page_are_the_programs():
    """Each is searched in parts, from one name or number to the next."""
    rows = re.findall(r"^\| (`.*?) \| ", PAGE.partition("## While")[0], re.M)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 25
    source = printed()
    for message in messages:
        parts = [part.strip() for part in message.split("…")]
        assert max(map(len, parts)) > 6, message
        for part in parts:
            assert part in source, f"{message}: {part}"


def test_the_waiting_line_can_be_searched_as_it_is_printed():
    heading = re.search(r'^### .*"(waiting for data) \d+%( \(raise .*\))"$', PAGE, re.M)
    assert heading
    assert f"{heading[1]} …{heading[2]}" in printed()


def test_the_page_is_short():
    assert len(PAGE.splitlines()) <= 210
