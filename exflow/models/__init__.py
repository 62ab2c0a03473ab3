"""From a Hugging Face checkpoint to one decoder definition; one file a family."""
