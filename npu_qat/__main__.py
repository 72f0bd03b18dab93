"""``python -m npu_qat`` is ``npu-qat``."""

from npu_qat.cli import main

raise SystemExit(main())
