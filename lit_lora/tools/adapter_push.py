"""``lit-lora adapter push``: uploads an adapter to the hub."""

from __future__ import annotations

from pathlib import Path

# Nothing heavy is imported here, not even for type checking: jsonargparse would import it for --help.


def push(
    input: str,  # noqa: A002
    repository: str,
    private: bool = False,
    message: str = "Upload an adapter",
    dry_run: bool = False,
    family: str | None = None,
) -> None:
    """Upload an adapter with its model card to the hub, as the user who is logged in (hf auth login).

    Of a folder the files of all formats, sample images and the model card are uploaded, and nothing else.

    Args:
        input: Adapter file (.safetensors), or folder with an adapter.
        repository: Id of the repository, such as USER/blue-stars; it is created unless it exists.
        private: Whether a new repository is private.
        message: Message of the commit.
        dry_run: Whether to list the files and show the model card without uploading anything.
        family: Model family of the base, such as StableDiffusionXL; defaults to the family that the input tells.

    Raises:
        UserError: If the input holds no complete adapter, nobody is logged in, or the hub refuses or cannot be reached.
    """
    from lit_lora.adapter_tools.push import Upload
    from lit_lora.byte_sizes import format_bytes
    from lit_lora.report_text import format_table
    from lit_lora.tools.adapter_input import read_input
    from lit_lora.visible import visible, visible_lines

    upload = Upload.of(read_input(input, family), Path(input), repository)
    print("\n".join(format_table([(visible(name), format_bytes(size)) for name, size in upload.sizes().items()])))
    if dry_run:
        print(f"\nnothing is uploaded to {repository}; its model card would be\n\n{visible_lines(upload.card)}")
    else:
        print(f"\nuploaded to {upload.push(private, message)}")
