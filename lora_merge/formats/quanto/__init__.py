"""optimum-quanto's form: single bytes or narrow codes in slabs, and `quanto_qmap.json` beside config.json."""
