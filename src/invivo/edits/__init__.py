"""The language of interventions: programs of edits and captures that a request carries."""
