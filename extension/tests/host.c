/* A host in C that passes SQLite's functions, and looks at the flock from outside. argv[1]: a new database. */
#include <fcntl.h>
#include <stdio.h>
#include <sqlite3.h>
#include <sys/file.h>
#include <unistd.h>

#include "kanbanlock.h"

static int is_flocked(const char *database) {
    char path[4096];
    int fd, held;
    snprintf(path, sizeof path, "%s.lock", database);
    fd = open(path, O_RDONLY);
    if (fd < 0) return 0;
    held = flock(fd, LOCK_EX | LOCK_NB) != 0;
    close(fd);
    return held;
}

static int execute(sqlite3 *db, const char *sql) {
    char *message = NULL;
    int code = sqlite3_exec(db, sql, NULL, NULL, &message);
    if (code != SQLITE_OK) fprintf(stderr, "%s: %s\n", sql, message ? message : "?");
    sqlite3_free(message);
    return code;
}

int main(int argc, char **argv) {
    kanbanlock_sqlite sqlite = {0};
    char message[500];
    sqlite3 *db = NULL;
    int before, within, after;
    if (argc != 2) return 2;

    sqlite.size = sizeof sqlite;
    sqlite.libversion_number = sqlite3_libversion_number;
    sqlite.threadsafe = sqlite3_threadsafe;
    sqlite.mprintf = sqlite3_mprintf;
    sqlite.log = sqlite3_log;
    sqlite.vfs_find = sqlite3_vfs_find;
    sqlite.vfs_register = sqlite3_vfs_register;
    sqlite.uri_parameter = sqlite3_uri_parameter;
    sqlite.uri_key = sqlite3_uri_key;
    if (kanbanlock_register_with(&sqlite, KANBANLOCK_MAKE_DEFAULT, message, sizeof message) != 0) {
        fprintf(stderr, "%s\n", message);
        return 1;
    }
    /* The other function, for the same copy of SQLite: already registered, so nothing changes. */
    if (kanbanlock_register_library(NULL, 0, message, sizeof message) != 0) {
        fprintf(stderr, "%s\n", message);
        return 1;
    }

    if (sqlite3_open(argv[1], &db) != SQLITE_OK) return 1;
    if (execute(db, "CREATE TABLE t (x)") != SQLITE_OK) return 1;
    before = is_flocked(argv[1]);
    if (execute(db, "BEGIN IMMEDIATE; INSERT INTO t VALUES (1)") != SQLITE_OK) return 1;
    within = is_flocked(argv[1]);
    if (execute(db, "COMMIT") != SQLITE_OK) return 1;
    after = is_flocked(argv[1]);
    sqlite3_close(db);
    printf("%s before, %s in the transaction, %s after\n", before ? "held" : "free", within ? "held" : "free",
           after ? "held" : "free");
    return 0;
}
