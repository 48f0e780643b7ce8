"""The field's benchmarks in their own file formats: pictures, a judge's verdicts, scores. See `docs/evaluation.md`."""
