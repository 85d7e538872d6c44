"""What the kernel's ublk driver and its server say to each other, as Linux 6.0 and later have it.

Own definitions of the kernel's: distributions' headers are older than the kernels that programs run on.

    /dev/ublk-control   control commands, each in the second half of a submission of 128 bytes
    /dev/ublkcN         the disk's queues: FETCH once for each tag, then COMMIT_AND_FETCH with each answer
    mapped from it      a queue's descriptors: what is asked for, by tag
    /dev/ublkbN         the disk

What the driver does, as its source of 6.12 has it unless said otherwise:
- A mapping is of one queue, read only, and exactly as many pages as its descriptors take. The first one binds the device to
  its process, until a recovery.
- A FETCH or an answer that is refused completes with the system call that hands it over: the driver never waits for it.
- Only the thread that fetched a tag may answer for it, and the kernel hands over its requests in that thread's system calls.
- A read or write that is answered with fewer bytes comes again for the rest. Of all other requests only errors count. With
  little memory a write may come with fewer sectors than were written, and the rest after it.
- A device that is stopped waits for the answers to all that is under way; then each tag is over.
- A server's end is seen by its threads' until 6.14, since then by the last close of /dev/ublkcN and of what is mapped.
- Partitions are looked for only if all threads that fetched have CAP_SYS_ADMIN.
- ublks_max of the module counts all devices in some kernels (6.0, 6.14), in others those of ordinary users only (6.12).
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    /* As ioctl's are: direction, size of the argument, 'u', number. Control commands have 32 bytes, others 16. */
    #define UBLK_CONTROL_OUT(number) (0x80207500u | (number))
    #define UBLK_CONTROL(number) (0xC0207500u | (number))
    #define UBLK_IO(number) (0xC0107500u | (number))
    """
    uint32_t UBLK_CONTROL_OUT(int number) noexcept nogil
    uint32_t UBLK_CONTROL(int number) noexcept nogil
    uint32_t UBLK_IO(int number) noexcept nogil

cdef enum:
    # control commands; those of the first group are UBLK_CONTROL_OUT
    GET_DEV_INFO = 0x02
    GET_PARAMS = 0x09
    GET_FEATURES = 0x13         # Linux 6.5
    DEL_DEV_ASYNC = 0x14        # 6.9
    ADD_DEV = 0x04
    DEL_DEV = 0x05
    START_DEV = 0x06
    STOP_DEV = 0x07
    SET_PARAMS = 0x08
    START_USER_RECOVERY = 0x10
    END_USER_RECOVERY = 0x11
    # commands of a queue
    FETCH = 0x20
    COMMIT_AND_FETCH = 0x21

cdef enum:
    # what a device is asked to be, and what a kernel has
    F_USER_RECOVERY = 1 << 3
    F_USER_RECOVERY_REISSUE = 1 << 4
    F_CMD_IOCTL_ENCODE = 1 << 6

cdef enum:
    # states
    DEV_DEAD
    DEV_LIVE
    DEV_QUIESCED
    DEV_FAIL_IO

cdef enum:
    # requests: bits 0 to 7 of a descriptor's op_flags
    IO_READ = 0
    IO_WRITE = 1
    IO_FLUSH = 2
    IO_DISCARD = 3
    IO_WRITE_ZEROES = 5
    IO_OP_MASK = 0xFF
    IO_F_NOUNMAP = 1 << 15      # zeros are to take the room that they would take if they were data

cdef enum:
    MAX_DEPTH = 4096
    MAX_QUEUES = 4096
    SECTOR_SHIFT = 9            # requests and sizes are counted in these, whatever the disk's block is

cdef enum:
    PARAM_BASIC = 1 << 0
    PARAM_DISCARD = 1 << 1
    PARAM_DEVT = 1 << 2

cdef struct control_command:
    uint32_t number             # of the device
    uint16_t queue              # NO_QUEUE
    uint16_t size               # of what is at address
    uint64_t address
    uint64_t data
    uint16_t path_size
    uint16_t pad
    uint32_t reserved

cdef enum:
    NO_QUEUE = 0xFFFF
    ANY_NUMBER = 0xFFFFFFFF

cdef struct device_info:
    uint16_t queues
    uint16_t depth
    uint16_t state
    uint16_t pad0
    uint32_t max_io_bytes
    uint32_t number
    int32_t pid                 # of the server
    uint32_t pad1
    uint64_t flags
    uint64_t server_flags       # the server's own
    uint32_t owner_uid
    uint32_t owner_gid
    uint64_t reserved[2]

cdef struct parameters_basic:
    uint32_t attributes         # 0: writable, not rotational, write through, no FUA
    uint8_t logical_shift
    uint8_t physical_shift
    uint8_t io_opt_shift
    uint8_t io_min_shift
    uint32_t max_sectors        # of a request
    uint32_t chunk_sectors
    uint64_t sectors
    uint64_t virt_boundary_mask

cdef struct parameters_discard:
    uint32_t alignment
    uint32_t granularity        # bytes
    uint32_t max_sectors
    uint32_t max_zeroes_sectors
    uint16_t max_segments
    uint16_t reserved

cdef struct parameters_devt:
    # Told by the kernel once the disk has been started.
    uint32_t char_major
    uint32_t char_minor
    uint32_t disk_major
    uint32_t disk_minor

cdef struct parameters:
    # What comes after that in newer kernels is not asked for: size tells them.
    uint32_t size
    uint32_t types
    parameters_basic basic
    parameters_discard discard
    parameters_devt devt

cdef struct descriptor:
    uint32_t op_flags
    uint32_t sectors
    uint64_t start_sector
    uint64_t address            # the buffer's, as it was fetched with

cdef struct queue_command:
    uint16_t queue
    uint16_t tag
    int32_t result              # COMMIT_AND_FETCH: bytes, or -errno
    uint64_t address            # the tag's buffer
