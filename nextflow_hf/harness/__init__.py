"""The field's benchmarks in their own file formats: pictures, verdicts of a judge, scores (see `docs/evaluation.md`)."""
