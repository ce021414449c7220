"""Tables, figures and HTML pages from the files of finished runs."""
