"""What was found, as data; figures and one self-contained HTML page of it."""
