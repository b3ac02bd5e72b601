"""The demo: four small tasks on assistant utterances that a seeded grammar of ours writes."""
