"""Locks that are held, and some that are not: test_assertions.py shows that zr_assert_held tells them apart."""

import threading

from zramd.core.system.checks cimport zr_assert_held
from zramd.core.system.locks cimport (
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_t,
    pthread_mutex_unlock,
)

cdef pthread_mutex_t lock
pthread_mutex_init(&lock, NULL)


def held() -> None:
    """As it should be."""
    take()
    look()
    give()
    in_a_thread(held_there)


def never_held() -> None:
    look()


def given_back() -> None:
    take()
    give()
    look()


def held_by_another() -> None:
    in_a_thread(take)
    look()


def held_there() -> None:
    take()
    look()
    give()


def take() -> None:
    pthread_mutex_lock(&lock)


def give() -> None:
    pthread_mutex_unlock(&lock)


def look() -> None:
    zr_assert_held(&lock)


def in_a_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
