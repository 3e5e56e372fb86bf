from django.db import migrations, models
class Migration(migrations.Migration):
    initial = True
    operations = [
        migrations.CreateModel("Writer", [("id", models.BigAutoField(primary_key=True)), ("name", models.CharField(max_length=50))]),
        migrations.CreateModel("Tag", [("id", models.BigAutoField(primary_key=True)), ("word", models.CharField(max_length=20, unique=True))]),
        migrations.CreateModel("Book", [("id", models.BigAutoField(primary_key=True)), ("title", models.CharField(max_length=100)),
            ("note", models.TextField(null=True)), ("pages", models.CharField(max_length=10, default="0")),
            ("writer", models.ForeignKey("shop.Writer", on_delete=models.CASCADE)), ("tags", models.ManyToManyField("shop.Tag"))]),
    ]
