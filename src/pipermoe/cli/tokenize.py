"""`pipermoe tokenize`."""

from __future__ import annotations

from pathlib import Path

from pipermoe.cli.options import Output, Switch
from pipermoe.cli.output import note, show


def tokenize(
    *inputs: Path,
    output: Output,
    tokenizer: str = "bytes",
    json_field: str = "text",
    workers: int | None = None,
    json: Switch = False,
) -> None:
    """Prepare text for training: memory-mapped token shards, which a job names in data.paths.

    A stopped preparation goes on where it was when the same command is given again.

    Parameters
    ----------
    inputs
        Text files (a document each), .jsonl files (a document in every line), or folders of such.
    output
        The folder to fill.
    tokenizer
        A tokenizers JSON file, or "bytes".
    json_field
        The field of a .jsonl line that holds the text.
    workers
        Processes that encode. Default: one for each processor.
    json
        Print the header of the folder as JSON.
    """
    import os

    from pipermoe.data.prepare import prepare_tokens
    from pipermoe.specs.errors import UserError
    from pipermoe.specs.units import format_bytes, format_number

    if not inputs:
        raise UserError("name at least one text file or folder")
    if workers is not None and workers < 1:
        raise UserError(f"--workers = {workers}: must be at least 1")
    header = prepare_tokens(
        inputs, output, tokenizer=tokenizer, json_field=json_field, workers=workers or len(os.sched_getaffinity(0))
    )
    counts = {"token": header.tokens, "document": header.documents, "shard": len(header.shards)}
    tokens, documents, shards = (format_number(count, noun) for noun, count in counts.items())
    summary = f"{tokens} of {documents}, {shards}, {format_bytes(header.tokens * header.token_type.itemsize)}"
    if json:
        show(header, lambda console: None, as_json=True)
    else:
        note(f"{summary}\nWrote {output}; train on it with data.paths = [{str(output)!r}]", as_json=False)
