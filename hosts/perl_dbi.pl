# Perl's DBD::SQLite, opened by URI.
use strict;
use warnings;
use DBI;

my ($kanbanlock, $database) = @ENV{qw(KANBANLOCK DATABASE)};
my $name = "dbi:SQLite:dbname=$database";
if ($kanbanlock) {
    # kanbanlock: load
    my $boot = DBI->connect("dbi:SQLite:dbname=:memory:", "", "", { RaiseError => 1 });
    $boot->sqlite_enable_load_extension(1);
    $boot->sqlite_load_extension($kanbanlock);
    # kanbanlock: open
    $name = "dbi:SQLite:uri=file:$database?vfs=kanbanlock";
    # kanbanlock: end
}
my $db = DBI->connect($name, "", "", { RaiseError => 1, PrintError => 0, AutoCommit => 1 });
$db->sqlite_busy_timeout(0);

# The line protocol of hosts/run.py: line_protocol.py says what it is.
$| = 1;
print "ready $db->{sqlite_version}\n";
while (my $line = <STDIN>) {
    chomp $line;
    my ($command, $text) = split / /, $line, 2;
    my $value;
    my $done = eval {
        if    ($command eq "begin")  { $db->do("BEGIN IMMEDIATE") }    # begin_work waits for the first statement
        elsif ($command eq "write")  { $db->do("INSERT INTO task VALUES (?)", undef, $text) }
        elsif ($command eq "commit") { $db->do("COMMIT") }
        elsif ($command eq "count")  { ($value) = $db->selectrow_array("SELECT count(*) FROM task") }
        else                         { die "unknown command $command\n" }
        1;
    };
    my $code = $db->err // 0;
    $db->rollback if !$done && !$db->{AutoCommit};    # to DBD::SQLite a BEGIN that failed has begun
    print $done ? (defined $value ? "ok $value\n" : "ok\n") : $code == 5 ? "busy\n" : "error $@\n";
}
