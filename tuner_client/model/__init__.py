"""From a model's file to a prepared module and its tasks."""
