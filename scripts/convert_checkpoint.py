"""Convert a Hugging Face directory or a GGUF file into a checkpoint that loads fast and verified.

    python scripts/convert_checkpoint.py SRC DST [--dtype bfloat16] [--force]

Killed at any moment it leaves no DST; run it again. Exit code 2 for bad input.
"""

import sys

from jaxllm.weights.convert import main

if __name__ == "__main__":
    sys.exit(main())
