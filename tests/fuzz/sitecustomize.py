"""Python imports this at its start, where this folder is on its path: a case's children are watched like the worker."""

import sentinel

sentinel.watch_this_child()
