{
  lib,
  buildGoModule,
  version,
}:
buildGoModule {
  pname = "sidegate";
  inherit version;

  # The compiled BPF object is among these, so that no clang is needed; the check bpf-object compares it with bpf/.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../go.mod
      ../go.sum
      ../appliance
    ];
  };
  vendorHash = "sha256-hgNtXqPLHQ3Kh4KreDMdAhgxydDIqJWIXCNU0cZbGLw="; # make nix-check says what it must be

  subPackages = [ "appliance/sidegate" ];
  env.CGO_ENABLED = 0;
  ldflags = [
    "-s"
    "-w"
    "-X main.version=${version}"
  ];
  doCheck = false; # its tests are a check of the flake: the program is built without them

  meta = {
    description = "Side-router gateway that decides in eBPF which flows go direct, through a proxy, or nowhere";
    license = lib.licenses.asl20;
    platforms = lib.platforms.linux;
    mainProgram = "sidegate";
  };
}
