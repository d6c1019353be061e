#!/usr/bin/perl
# Turns Debian's package catalogue into two tables.
#
#   apt-cache dumpavail | demo/catalogue.pl FOLDER
#
# writes FOLDER/maintainers.copy and FOLDER/packages.copy in COPY's text format, columns as in demo/tables.sql.
# One record per name: the first, which is the version apt would install.
use strict;
use warnings;

my ($folder) = @ARGV or die "usage: catalogue.pl FOLDER\n";
open my $packages,    '>', "$folder/packages.copy"    or die "packages.copy: $!\n";
open my $maintainers, '>', "$folder/maintainers.copy" or die "maintainers.copy: $!\n";

# A value for COPY: backslash, tab and line's end are escaped, nothing is NULL.
sub text {
    my ($value) = @_;
    return '\N' unless defined $value && $value ne '';
    $value =~ s/\\/\\\\/g;
    $value =~ s/\t/\\t/g;
    $value =~ s/\r/\\r/g;
    $value =~ s/\n/\\n/g;
    return $value;
}

# text[]: every element in quotes.
sub array {
    my @elements = @_;
    for (@elements) { s/(["\\])/\\$1/g }
    return text('{' . join(',', map { "\"$_\"" } @elements) . '}');
}

sub list {
    my ($value) = @_;
    return defined $value ? grep { $_ ne '' } split /\s*,\s*/, $value : ();
}

my (%seen, %maintainer, $field, %record);

sub finish {
    return unless defined $record{Package} && !$seen{ $record{Package} }++;
    my $who = $record{Maintainer} // 'unknown';
    my $id  = $maintainer{$who};
    if (!defined $id) {
        $id = $maintainer{$who} = 1 + keys %maintainer;
        my ($name, $email) = $who =~ /^\s*"?(.*?)"?\s*<(.*)>/ ? ($1, $2) : ($who, undef);
        print $maintainers join("\t", $id, text($name), text($email)), "\n";
    }
    my $description = $record{Description} // $record{'Description-en'};
    # A line with a lone dot is a paragraph's end.
    $description =~ s/\n \.(?=\n|$)/\n/g if defined $description;
    # "libc6 (>= 2.34) | libc" is the package libc6, or another.
    my %named;
    my @depends = grep { !$named{$_}++ } map { /^([^\s(:|]+)/ ? $1 : () } list($record{Depends});
    print $packages join("\t",
        text($record{Package}), text($record{Version}), text($record{Section}), text($record{Priority}),
        $id, text($description), array(@depends), array(list($record{Tag})),
        text($record{Size}), text($record{'Installed-Size'}), text($record{Homepage})), "\n";
}

while (my $line = <STDIN>) {
    chomp $line;
    if ($line eq '') {
        finish();
        %record = ();
    }
    elsif ($line =~ /^\s/) {
        $record{$field} .= "\n$line" if defined $field;
    }
    elsif ($line =~ /^([^:\s]+):\s*(.*)$/) {
        ($field, $record{$1}) = ($1, $2);
    }
}
finish();
close $packages    or die "packages.copy: $!\n";
close $maintainers or die "maintainers.copy: $!\n";
