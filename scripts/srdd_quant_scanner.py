"""The design documents' scanner, by its name and with its options: the published method.

    python scripts/srdd_quant_scanner.py --model_path MODEL --quant_type mxfp4 \
        --injection_point both --output w4a4_srdd_results.json
"""

from __future__ import annotations

import sys

from npu_qat.cli import main

if __name__ == "__main__":
    sys.exit(main(["scan", "--method", "published", *sys.argv[1:]]))
