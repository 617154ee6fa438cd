# Tcl's sqlite3, opened by the name of the VFS.
package require sqlite3
set kanbanlock $env(KANBANLOCK)
set database $env(DATABASE)

if {$kanbanlock ne ""} {
    # kanbanlock: load
    sqlite3 boot :memory:
    boot enable_load_extension 1
    boot eval {SELECT load_extension($kanbanlock)}
    # kanbanlock: open
    sqlite3 db $database -vfs kanbanlock
    # kanbanlock: end
} else {
    sqlite3 db $database
}
db timeout 0

# The line protocol of hosts/run.py: line_protocol.py says what it is.
fconfigure stdout -buffering line
puts "ready [sqlite3 -version]"
while {[gets stdin line] >= 0} {
    set text [string range $line 6 end]
    switch [lindex [split $line] 0] {
        begin  {set sql {BEGIN IMMEDIATE}}
        write  {set sql {INSERT INTO task VALUES ($text)}}
        commit {set sql {COMMIT}}
        count  {set sql {SELECT count(*) FROM task}}
    }
    if {![catch {db eval $sql} value]} {
        puts [string trimright "ok $value"]
    } elseif {[db errorcode] == 5} {
        puts busy
    } else {
        puts "error $value"
    }
}
