"""Python runs this before anything else where its folder is on PYTHONPATH."""

import light
import tamper

light.install()
tamper.install()
