"""What a bulk run did, in words for people: the summary, what to do next, and a question if the directory is wrong."""

from collections.abc import Iterator, Mapping

from ..bulk.outcomes import Outcome

_WORDS = {
    Outcome.MIGRATED: "backed up",
    Outcome.RESTORED: "restored",
    Outcome.OK: "good",
    Outcome.DIFFERS: "different on disk",
    Outcome.MISSING_ON_DISK: "missing on disk",
    Outcome.MISSING_IN_DATABASE: "not backed up",
    Outcome.CORRUPT_IN_DATABASE: "damaged in the database",
    Outcome.DELETED: "deleted, but still on disk",
    Outcome.INVALID_NAME: "skipped (not valid names)",
    Outcome.FAILED: "failed",
    Outcome.SKIPPED: "left alone (dotfiles, litter, links, --exclude)",
}
_WORDS_OF = {
    "migrate": {Outcome.OK: "already backed up"},
    "restore": {Outcome.OK: "already on disk", Outcome.DELETED: "deleted (files removed)"},
    "import": {
        Outcome.MIGRATED: "imported",
        Outcome.OK: "already imported",
        Outcome.DIFFERS: "different in the database",
        Outcome.CORRUPT_IN_DATABASE: "damaged",
        Outcome.DELETED: "deleted in the database",
    },
    "export": {Outcome.RESTORED: "exported", Outcome.OK: "already exported, or deleted"},
}
_DRY_WORDS_OF = {
    "migrate": {Outcome.MIGRATED: "would be backed up"},
    "restore": {Outcome.RESTORED: "would be restored", Outcome.DELETED: "deleted (files would be removed)"},
    "import": {Outcome.MIGRATED: "would be imported"},
    "export": {Outcome.RESTORED: "would be exported"},
}
_NOTHING = {
    "migrate": "the tables are ready; there is no file to back up",
    "verify": "there is no file and no record to check",
    "restore": "the database has no name to restore",
    "import": "the source has no upload",
    "export": "the database has no name to export",
}
_DRY_NOTHING = {"migrate": "there is no file to back up"}
_AFTER = {
    "migrate": {
        Outcome.MIGRATED: "`selfheal verify --drill`{flags} proves that every file can be restored",
        Outcome.DELETED: "`selfheal restore`{flags} removes the files of deleted names",
    },
    "verify": {
        Outcome.MISSING_ON_DISK: "`selfheal restore`{flags} brings back what is missing on disk",
        Outcome.MISSING_IN_DATABASE: "`selfheal migrate`{flags} stores what is not backed up",
        Outcome.CORRUPT_IN_DATABASE: "`selfheal migrate`{flags} repairs the database from good files on disk",
        Outcome.DELETED: "`selfheal restore`{flags} removes the files of deleted names",
    },
    "restore": {
        Outcome.CORRUPT_IN_DATABASE: "`selfheal migrate`{flags} on a node that has good files repairs the database",
    },
    "import": {
        Outcome.MIGRATED: "`selfheal restore`{flags} puts the files on this disk, or their first requests do",
    },
    "export": {
        Outcome.CORRUPT_IN_DATABASE: "`selfheal migrate`{flags} on a node that has good files repairs the database",
    },
}
"""What to do after a command that had an outcome."""


def in_words(command: str, counts: Mapping[str, int], *, dry_run: bool) -> str:
    """Return how many files had which outcome: "6 backed up, 1 failed"."""
    words, nothing = _WORDS | _WORDS_OF.get(command, {}), _NOTHING
    if dry_run:
        words, nothing = words | _DRY_WORDS_OF.get(command, {}), _NOTHING | _DRY_NOTHING
    parts = [f"{counts[outcome]:,} {word}" for outcome, word in words.items() if counts.get(outcome)]
    return ", ".join(parts) or nothing[command]


def next_steps(command: str, counts: Mapping[str, int], flags: str, *, dry_run: bool) -> Iterator[str]:
    """Yield what to do next; `flags` are appended to each command."""
    planned = _DRY_WORDS_OF.get(command, {}) if dry_run else {}
    if any(counts.get(outcome) for outcome in planned):
        yield "the same command without --dry-run does this"
        return
    for outcome, text in _AFTER[command].items():
        if counts.get(outcome):
            yield text.format(flags=flags)


def is_directory_right(directory: str, *, exists: bool, recorded: int) -> str:
    """Return a question for people: there is no upload in the directory, but the database has some."""
    state = "is empty" if exists else "does not exist"
    return (
        f"the directory {directory} {state}, but the database has {counted(recorded, 'name')}: is --directory right? "
        "`selfheal restore` brings them back"
    )


def counted(number: int, what: str) -> str:
    """Return "1 file", "2 files"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def human_size(size: int) -> str:
    """Return a size in bytes for people: 15600 is "15.6 KB"."""
    if size < 1000:
        return counted(size, "byte")
    power = next((one for one in (1, 2, 3) if size < 999_950 * 1000 ** (one - 1)), 4)  # 999.95 KB is 1.0 MB
    return f"{size / 1000**power:,.1f} {'KMGT'[power - 1]}B"
