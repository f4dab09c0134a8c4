"""TEMPORARY."""


def __getattr__(name):
    if name == "Study":
        from kdlib.study.study import Study

        return Study
    raise AttributeError(name)
