/*
** kanbanlock: every write transaction of SQLite also holds flock(LOCK_EX) on <db>.lock.
**
** The C interface of libkanbanlock.so. It is needed only by a host that cannot, or may not, call
** sqlite3_load_extension(); all others load the library, and need no header:
**
**     SELECT load_extension('/path/to/libkanbanlock.so');                                    -- ?vfs=kanbanlock
**     SELECT load_extension('/path/to/libkanbanlock.so', 'sqlite3_kanbanlockdefault_init');  -- every connection
**
** A VFS is registered with one copy of SQLite in one process. A process may hold several copies (Python's own and
** another module's, say): register with each of them. Registering again is harmless.
**
** Connections that are open already stay as they are. The library stays loaded until the process ends.
** All functions are thread-safe, and none of them aborts the process.
*/
#ifndef KANBANLOCK_H
#define KANBANLOCK_H

#include <stddef.h> /* size_t */

#ifdef __cplusplus
extern "C" {
#endif

/* SQLite's own types; <sqlite3.h> may be included before or after this file, or not at all. */
struct sqlite3;
struct sqlite3_api_routines;
struct sqlite3_vfs;

/* The name of the VFS, for "file:kanban.db?vfs=kanbanlock" or the last argument of sqlite3_open_v2(). */
#define KANBANLOCK_VFS_NAME "kanbanlock"

/* A flag: also make it the default VFS, so that connections opened by plain path go through it. It may be added by a
** later call, and is not taken back by a call without it. */
#define KANBANLOCK_MAKE_DEFAULT 1u

/*
** The functions of one copy of SQLite, 3.14 or later: each is the sqlite3_ function of its name. All of them must be of
** the same copy, which must stay loaded until the process ends. Clear the structure before you fill it.
*/
typedef struct kanbanlock_sqlite {
    size_t size; /* sizeof(kanbanlock_sqlite) */
    int (*libversion_number)(void);
    int (*threadsafe)(void); /* may be NULL: then this SQLite is taken to be thread-safe */
    char *(*mprintf)(const char *, ...);
    void (*log)(int, const char *, ...);
    struct sqlite3_vfs *(*vfs_find)(const char *);
    int (*vfs_register)(struct sqlite3_vfs *, int);
    const char *(*uri_parameter)(const char *, const char *);
    const char *(*uri_key)(const char *, int); /* SQLite 3.31 or later. NULL: misspelt kanbanlock_ parameters go unnoticed */
} kanbanlock_sqlite;

/*
** Registers the VFS "kanbanlock" with the copy of SQLite that these functions are of.
**
** flags         0 or KANBANLOCK_MAKE_DEFAULT
** message       room for a message, or NULL; 500 bytes are enough. It ends in a NUL byte, and is "" on success
** message_size  its size in bytes
**
** Returns 0 (SQLITE_OK), or 1 (SQLITE_ERROR): then nothing has been registered, and the message says what to do.
*/
int kanbanlock_register_with(const kanbanlock_sqlite *sqlite, unsigned flags, char *message, int message_size);

/*
** The same with the copy of SQLite that dlsym(3) finds through `library`: a handle from dlopen(3), of the library that
** contains SQLite or of one that is linked with it, or NULL for the program itself.
*/
int kanbanlock_register_library(void *library, unsigned flags, char *message, int message_size);

/* The entry points that sqlite3_load_extension() and sqlite3_auto_extension() call. */
int sqlite3_kanbanlock_init(struct sqlite3 *db, char **message, const struct sqlite3_api_routines *routines);
int sqlite3_kanbanlockdefault_init(struct sqlite3 *db, char **message, const struct sqlite3_api_routines *routines);

#ifdef __cplusplus
}
#endif

#endif /* KANBANLOCK_H */
