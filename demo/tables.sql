create table maintainers (
    id integer primary key,
    name text not null,
    email text
);

create table packages (
    name text primary key,
    version text not null,
    section text,
    priority text,
    maintainer_id integer not null references maintainers,
    description text,
    depends text[] not null,
    tags text[] not null,
    size bigint,
    installed_size bigint,
    homepage text
);
