"""`python -m retrv_r1_retriever.cli`, the same as `retrv-r1`."""

from retrv_r1_retriever.cli import main

raise SystemExit(main())
