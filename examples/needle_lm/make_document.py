"""Write document.txt: chapter 3 ("Data model") of the Python Language Reference, as `pydoc` ships it.

Copyright (c) 2001-2023 Python Software Foundation; PSF License Version 2 (free use with this notice).
The committed file was made with Python 3.11.7; later versions word some sections differently.

    python examples/needle_lm/make_document.py
"""

from pathlib import Path
from pydoc_data.topics import topics

TOPICS = ("objects", "types", "specialnames")
NOTICE = (
    "The Python Language Reference, chapter 3: Data model\n"
    "Copyright (c) 2001-2023 Python Software Foundation. Licensed under the PSF License Version 2.\n\n"
)


def main() -> None:
    """Join the topics in reading order."""
    text = NOTICE + "\n\n".join(topics[name].strip() for name in TOPICS) + "\n"
    Path(__file__).with_name("document.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
