"""``python -m megatron_groupmates`` and ``deepspeed --module megatron_groupmates``."""

import sys

from megatron_groupmates.cli.main import main

sys.exit(main())
