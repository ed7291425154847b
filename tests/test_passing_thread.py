"""Work in a thread that ends with it."""

from __future__ import annotations

import subprocess
import sys
import threading

from invivo.passing_thread import in_passing_thread

LATE = """
import threading
from invivo.errors import Unavailable
from invivo.passing_thread import in_passing_thread

def late():
    threading.main_thread().join()
    try:
        in_passing_thread(int)
    except Unavailable as error:
        print(error)

threading.Thread(target=late).start()
"""


def test_the_thread_is_another_and_gone_afterwards() -> None:
    thread = in_passing_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_a_program_that_ends_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=True)
    assert done.stdout == "the program is ending\n"
