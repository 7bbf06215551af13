"""The laboratory: many runs made in parallel, each once, and what they say, as tables and plots.

    grid        what is crossed with what, from a TOML file or Python
    pieces      one run or ensemble: a folder, and a fingerprint of all it depends on
    pool        makes pieces in parallel, keeps what is finished, goes on where it was
    results     figures of finished runs, by run and over seeds
    findings    what an experiment has found, and the claims it is held to
    charts      plots, for a page and as pictures

Named experiments stand in `named`; the theory they are held to in `theory`.
"""
