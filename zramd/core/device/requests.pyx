"""nbdkit's requests as functions that are C from end to end: what nbdkit_plugin.py names pread, pwrite, trim, zero, ...

A request that fails must leave nothing behind. nbdkit (1.32 at least) never frees the exception that a callback raises: as a
Python function each failed write left 1.6 KB, an exception with its traceback and frames, and a kernel that finds
its swap device full sends thousands. So the functions here have no frames, and the errors of a full pool are exceptions
that are made once and raised again and again: 0 bytes a failure.

Each of them holds the GIL, takes the arguments apart, and releases the GIL for all of the work. Each keeps the
thread's Python state, see threadstate.pyx.
"""

from libc.errno cimport EBADMSG, EDQUOT, EIO, ENOMEM, ENOSPC, EREMOTEIO
from libc.stdint cimport uint64_t

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.object cimport PyObject

from zramd.core.device.device cimport Device
from zramd.core.system.threadstate cimport keep_current

from zramd.errors import error_from

cdef extern from *:
    """
    /* Serves one request; -1 with an exception set. */
    typedef int (*zr_handler)(int request, PyObject **arguments);
    static zr_handler zr_serve;

    #define ZR_REQUEST(number, name) \\
        static PyObject *zr_##name(PyObject *self, PyObject *const *arguments, Py_ssize_t count) \\
        { \\
            (void)self; \\
            if (count != 4) { \\
                PyErr_SetString(PyExc_TypeError, #name " takes 4 arguments"); \\
                return NULL; \\
            } \\
            if (zr_serve(number, (PyObject **)arguments)) \\
                return NULL; \\
            Py_RETURN_NONE; \\
        }
    #define ZR_METHOD(name, text) {#name, (PyCFunction)(void (*)(void))zr_##name, METH_FASTCALL, #name text}

    enum { PREAD, PWRITE, TRIM, ZERO };
    ZR_REQUEST(PREAD, pread)
    ZR_REQUEST(PWRITE, pwrite)
    ZR_REQUEST(TRIM, trim)
    ZR_REQUEST(ZERO, zero)
    static PyMethodDef zr_methods[] = {
        ZR_METHOD(pread, "(device, buf, offset, flags): fill a writable buffer from offset."),
        ZR_METHOD(pwrite, "(device, buf, offset, flags): write a buffer to offset."),
        ZR_METHOD(trim, "(device, count, offset, flags): free the whole blocks of a range."),
        ZR_METHOD(zero, "(device, count, offset, flags): zero a range; with FLAG_MAY_TRIM whole blocks become holes."),
    };
    static PyObject *zr_function(int request, zr_handler serve)
    {
        zr_serve = serve;
        return PyCFunction_NewEx(&zr_methods[request], NULL, NULL);
    }

    /* Raise an exception. It gets no traceback, because no Python frame is here. */
    static void zr_raise(PyObject *error) { PyErr_SetObject((PyObject *)Py_TYPE(error), error); }
    """
    ctypedef int (*zr_handler)(int request, PyObject **arguments) except -1
    int PREAD, PWRITE, TRIM, ZERO
    object zr_function(int request, zr_handler serve)
    void zr_raise(object error) noexcept

cdef enum:
    # NBDKIT_FLAG_...: part of nbdkit's interface, the same in all its versions
    MAY_TRIM = 1
    REQ_ONE = 4

cdef object tell_errno = None           # nbdkit.set_error
cdef int full_errno = ENOSPC            # what a client gets when the pool is full
cdef object pool_full = error_from(-ENOSPC, "pool is full")
cdef object state_full = error_from(-EDQUOT, "pool is full")
cdef object no_memory = error_from(-ENOMEM, "a request")
cdef bint one_extent = False            # report one extent at a time to a client


cdef int serve(int request, PyObject **arguments) except -1:
    cdef Device device = <Device?><object>arguments[0]
    cdef uint64_t offset = <object>arguments[2], length
    cdef unsigned int flags = <object>arguments[3]
    cdef Py_buffer view
    cdef int rc
    keep_current()
    if request == PREAD or request == PWRITE:
        PyObject_GetBuffer(<object>arguments[1], &view, PyBUF_WRITABLE if request == PREAD else PyBUF_SIMPLE)
        length = view.len
        with nogil:
            if request == PREAD:
                rc = device.serve_read(<char *>view.buf, offset, length)
            else:
                rc = device.serve_write(<const char *>view.buf, offset, length)
        PyBuffer_Release(&view)
    else:
        length = <object>arguments[1]
        with nogil:
            if request == TRIM:
                rc = device.serve_trim(offset, length)
            else:
                # Both ways are fast, so the fast-zero flag asks for nothing more.
                rc = device.serve_zero(offset, length, flags & MAY_TRIM)
    if rc:
        fail(device, rc, offset, length)
        return -1
    return 0


cdef void fail(Device device, int rc, uint64_t offset, uint64_t length) noexcept:
    """Raise the exception for -errno, and tell nbdkit which errno the client gets."""
    cdef bint full = rc == -ENOSPC or rc == -EDQUOT or rc == -ENOMEM
    if tell_errno is not None:
        tell_errno(full_errno if full else EIO if rc == -EREMOTEIO or rc == -EBADMSG else -rc)
    if full:
        zr_raise(pool_full if rc == -ENOSPC else state_full if rc == -EDQUOT else no_memory)
    else:
        zr_raise(error_from(rc, f"request for {length} bytes at {offset}{device.culprit(rc, offset, length)}"))


def prepare(tell, int full, bint one=False):
    """Say how a client learns of an error: tell is nbdkit.set_error, full the errno for a full pool.

    one: extents are reported one at a time, whatever the client asks for.
    """
    global tell_errno, full_errno, one_extent
    tell_errno = tell
    full_errno = full
    one_extent = one


def flush(device, flags):
    """Nothing to do: what is answered is in memory."""
    keep_current()


def cache(device, count, offset, flags):
    """Do nothing with the range (count, offset: bytes): everything is in memory already."""
    keep_current()


def extents(device, count, offset, flags):
    """What is stored in a range of bytes, as Device.extents; with FLAG_REQ_ONE only the first extent."""
    keep_current()
    return device.extents(offset, count, one_extent or bool(flags & REQ_ONE))


pread = zr_function(PREAD, serve)
pwrite = zr_function(PWRITE, serve)
trim = zr_function(TRIM, serve)
zero = zr_function(ZERO, serve)
