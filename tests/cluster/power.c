/* What a disk holds for certain: whenever a file in the watched directory is synchronised, its content of that moment is
 * put aside. After a power cut that, and nothing else, may be left. Loaded before the C library by the test. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static void put_aside(int fd) {
    const char *watched = getenv("POWER_WATCH"), *aside = getenv("POWER_ASIDE");
    char link[64], path[PATH_MAX], part[PATH_MAX], kept[PATH_MAX];
    if (!watched || !aside) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = readlink(link, path, sizeof path - 1);
    if (len <= 0) return;
    path[len] = 0;
    char *name = strrchr(path, '/');
    if (!name || strncmp(path, watched, strlen(watched)) || strlen(watched) != (size_t)(name - path)) return;
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) return;
    snprintf(part, sizeof part, "%s%s.%d.part", aside, name, getpid());
    snprintf(kept, sizeof kept, "%s%s", aside, name);
    int in = open(path, O_RDONLY | O_CLOEXEC), out = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    char buffer[65536];
    ssize_t n = 0;
    while (in >= 0 && out >= 0 && (n = read(in, buffer, sizeof buffer)) > 0)
        if (write(out, buffer, n) != n) abort();
    if (in >= 0) close(in);
    if (out >= 0) close(out);
    if (in >= 0 && out >= 0) rename(part, kept);
}

/* One at a time, whichever process it is: an older content must not be put over a newer one. */
static int sync_and_put_aside(const char *function, int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, function);
    const char *aside = getenv("POWER_ASIDE");
    char path[PATH_MAX];
    int lock = -1;
    if (aside) {
        snprintf(path, sizeof path, "%s/lock", aside);
        lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (lock < 0 || flock(lock, LOCK_EX)) abort();
    }
    int result = real(fd);
    if (result == 0) put_aside(fd);
    if (lock >= 0) close(lock);
    return result;
}

int fsync(int fd) { return sync_and_put_aside("fsync", fd); }
int fdatasync(int fd) { return sync_and_put_aside("fdatasync", fd); }
