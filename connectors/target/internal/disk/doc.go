// Package disk installs the files of one certificate so that a crash at any moment leaves the old or the new set, and
// so that a later process can finish or take back what it finds from a receipt alone.
//
// Two layouts:
//
//	versions  <dir>/versions/<name>/{cert,key,…} and one symbolic link <dir>/current, swapped by rename
//	files     one to three files at fixed paths, each replaced by rename
//
// With versions the switch is one rename: readers that resolve the link once see the old or the new set. With one file
// the same holds. Two or three fixed paths cannot be switched at once: everything that can fail for want of space or
// permission is done by Stage (new files and backups lie beside, synced), Commit only renames, and the receipt holds a
// digest of each old and new file, so that Repair can tell from the files themselves how far it got:
//
//	every file is old                     nothing was committed; Undo removes what lies beside
//	every file is new                     committed; Undo renames the backups back
//	some old, some new, all staged there  Commit was cut: Repair finishes it
//	some old, some new, otherwise         Undo was cut: Repair finishes that
//	certificate and key are neither       someone installed something later: never touched
//
// Backups are restored by rename, not by copy: going back needs no space.
//
// Every path is reached from an os.Root opened at one of the allowed roots, component by component; symbolic links on
// the way are refused. What this package writes beside a file begins with a dot, because some servers load every other
// file of a directory (HAProxy's crt does). It knows nothing of certificates; secrets in files are never logged, and a
// receipt holds digests only.
package disk
